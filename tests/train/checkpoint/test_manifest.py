"""The manifest: it comes back, every damaged bit is found, and what a stranger made of it is refused."""

import json

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from armillary.train.checkpoint.boxes import Box
from armillary.train.checkpoint.manifest import (
    Manifest,
    Shard,
    Stored,
    StoredFile,
    decode_manifest,
    encode_manifest,
    merge_parts,
)


def stored(dtype, shape, *shards):
    return Stored(dtype, shape, tuple(Shard(file, Box(*box), checksum * 32) for file, box, checksum in shards))


def example(weight="b", other="c"):
    files = {f"rank-0000{rank}.safetensors": StoredFile(200 + rank, "a" * 32) for rank in range(2)}
    tensors = {
        "model/w": stored(
            "BF16",
            (5, 2),
            ("rank-00000.safetensors", ((0, 0), (3, 2)), "1"),
            ("rank-00001.safetensors", ((3, 0), (2, 2)), weight),
        ),
        "optimizer/step": stored("F32", (), ("rank-00000.safetensors", ((), ()), other)),
        "model/none": stored("F32", (0, 3)),
    }
    return Manifest(7, 2, {"step": 7, "loss": 1e-5, "name": "ä"}, files, tensors)


def resealed(change):
    """An encoded manifest that was changed and given a right checksum again: hostile, not damaged."""
    content = json.loads(encode_manifest(example()))["manifest"]
    change(content)
    text = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return b'{"checksum":"%s","manifest":%s}\n' % (xxhash.xxh3_128_hexdigest(text).encode(), text)


def test_manifest_comes_back():
    assert decode_manifest(encode_manifest(example())) == example()


def test_every_flipped_bit_of_a_manifest_is_found():
    data = encode_manifest(example())
    for position in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(ValueError):
            decode_manifest(bytes(damaged))


def test_every_cut_manifest_is_found():
    data = encode_manifest(example())
    for end in range(len(data)):
        with pytest.raises(ValueError):
            decode_manifest(data[:end])


W = "model/w"
HOSTILE = {
    "format": lambda c: c.update(format=2),
    "no tensors": lambda c: c.pop("tensors"),
    "tensors a list": lambda c: c.update(tensors=[]),
    "negative step": lambda c: c.update(step=-1),
    "true for a number": lambda c: c.update(num_ranks=True),
    "huge shape": lambda c: c["tensors"][W].update(shape=[1 << 40, 1 << 40]),
    "many dims": lambda c: c["tensors"][W].update(shape=[1] * 17),
    "fraction in a shape": lambda c: c["tensors"][W].update(shape=[5.0, 2]),
    "unknown dtype": lambda c: c["tensors"][W].update(dtype="F31"),
    "dtype a list": lambda c: c["tensors"][W].update(dtype=[]),
    "shard outside": lambda c: c["tensors"][W]["shards"][0].update(offsets=[3, 0]),
    "shard of other dims": lambda c: c["tensors"][W]["shards"][0].update(offsets=[0], sizes=[12]),
    "bytes": lambda c: c["tensors"][W]["shards"][0].update(bytes=13),
    "path up": lambda c: c["tensors"][W]["shards"][0].update(file="../rank-00000.safetensors"),
    "absolute path": lambda c: c["files"].update({"/etc/passwd": {"size": 200, "header": "a" * 32}}),
    "unlisted file": lambda c: c["tensors"][W]["shards"][0].update(file="rank-00009.safetensors"),
    "file too small": lambda c: c["files"]["rank-00000.safetensors"].update(size=3),
    "checksum": lambda c: c["tensors"][W]["shards"][0].update(checksum="x"),
    "empty name": lambda c: c["tensors"].update({"": c["tensors"][W]}),
    "long name": lambda c: c["tensors"].update({"n" * 1001: c["tensors"][W]}),
    "control character": lambda c: c["tensors"].update({"a\x1b[2J": c["tensors"][W]}),
    "facts a list": lambda c: c.update(facts=[]),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_manifest_out_of_bounds_is_refused(kind):
    with pytest.raises(ValueError) as caught:
        decode_manifest(resealed(HOSTILE[kind]))
    assert "differs from its own checksum" not in str(caught.value)


@given(st.binary(max_size=60))
def test_any_bytes_are_refused_without_another_error(data):
    with pytest.raises(ValueError):
        decode_manifest(data)


def test_deep_json_is_refused():
    with pytest.raises(ValueError):
        decode_manifest(b"[" * 100_000)


def part(rank, shards, dtype="F32", shape=(4,)):
    file = f"rank-{rank:05d}.safetensors"
    entry = stored(dtype, shape, *((file, box, "1") for box in shards))
    return Manifest(1, 2, {"rank": rank}, {file: StoredFile(99, "a" * 32)}, {"model/w": entry})


def test_parts_are_merged_with_the_facts_of_rank_0():
    merged = merge_parts([part(0, [((0,), (3,))]), part(1, [((3,), (1,))])])
    assert merged.facts == {"rank": 0}
    assert [shard.file for shard in merged.tensors["model/w"].shards] == [
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    ]


def test_parts_that_leave_a_gap_are_refused():
    with pytest.raises(ValueError, match="'model/w' do not hold each element"):
        merge_parts([part(0, [((0,), (2,))]), part(1, [((3,), (1,))])])


def test_a_tensor_that_nobody_writes_is_refused():
    with pytest.raises(ValueError, match="'model/w'"):
        merge_parts([part(0, []), part(1, [])])


def test_ranks_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"'model/w' is F32 \(5,\) on rank 1 and F32 \(4,\)"):
        merge_parts([part(0, [((0,), (4,))]), part(1, [], shape=(5,))])


def test_weights_follow_the_model_alone():
    assert example().weights == example(other="d").weights
    assert example().weights != example(weight="d").weights
