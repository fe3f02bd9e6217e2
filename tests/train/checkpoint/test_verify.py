"""Verification: every byte that changed on the disk is found and told by file and tensor."""

import io
import json
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from armillary.train.checkpoint.manifest import Manifest, Stored, encode_manifest
from armillary.train.checkpoint.store import read_manifest
from armillary.train.checkpoint.verify import read_header, verify


def header_of(data):
    return read_header(io.BytesIO(data), len(data))


def with_header(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_header_says_where_the_bytes_are():
    data = save({"a": np.arange(3, dtype=np.int64), "b": np.ones((2, 2), dtype=np.float32), "c": np.zeros((0, 4))})
    entries, _ = header_of(data)
    a = entries["a"]
    assert (a.dtype, a.shape, a.num_bytes) == ("I64", (3,), 24)
    assert data[a.start : a.start + a.num_bytes] == np.arange(3, dtype=np.int64).tobytes()
    assert entries["c"].num_bytes == 0


def one(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        (1 << 40).to_bytes(8, "little") + b"{}",
        with_header(b"{"),
        with_header([]),
        with_header({"a": one(dtype="X")}, b"1234"),
        with_header({"a": one(dtype=[])}, b"1234"),
        with_header({"a": one(shape=(5,))}, b"1234"),
        with_header({"a": one(shape=(-4,))}, b"1234"),
        with_header({"a": one(shape=(1 << 60, 1 << 60))}, b"1234"),
        with_header({"a": one(offsets=(0,))}, b"1234"),
        with_header({"a": one(offsets=(1, 5))}, b"12345"),
        with_header({"a": one(), "b": one()}, b"1234"),
        with_header({"a": one(), "b": one(offsets=(2, 6))}, b"12345678"),
        with_header({"a": one()}, b"12345"),
        with_header({"a": one()}, b"123"),
        with_header(b"[" * 100_000),
    ],
)
def test_damaged_headers_are_refused(data):
    with pytest.raises(ValueError):
        header_of(data)


@given(st.binary(max_size=40))
def test_any_bytes_are_refused_or_read_without_another_error(data):
    for candidate in (data, with_header(data)):
        with suppress(ValueError):
            header_of(candidate)


# ---- Verification ----------------------------------------------------------------------------------------------------


def test_a_sound_checkpoint_has_no_problems(checkpoints):
    assert verify(checkpoints / "step-00000200") == []


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00001.safetensors", "manifest.json"])
def test_a_flipped_bit_anywhere_is_found(checkpoints, name):
    path = checkpoints / "step-00000200" / name
    data = path.read_bytes()
    for position, byte in enumerate(data):
        path.write_bytes(data[:position] + bytes([byte ^ 1 << position % 8]) + data[position + 1 :])
        problems = verify(path.parent)
        assert problems, f"byte {position}"
        assert name in problems[0]
    path.write_bytes(data)
    assert verify(path.parent) == []


def test_a_flipped_bit_in_a_tensor_names_it(checkpoints):
    path = checkpoints / "step-00000200" / "rank-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(data)
    assert verify(path.parent) == [
        "tensor 'model/w' in rank-00001.safetensors: its checksum differs; its bytes changed on the disk"
    ]


def test_a_cut_file_is_found_at_every_length(checkpoints):
    path = checkpoints / "step-00000200" / "rank-00001.safetensors"
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert any("rank-00001.safetensors" in problem and "model/w" in problem for problem in verify(path.parent))
    path.write_bytes(data + b"\0")
    assert "bytes" in verify(path.parent)[0]


def test_a_missing_file_is_named_with_its_tensors(checkpoints):
    (checkpoints / "step-00000200" / "rank-00000.safetensors").unlink()
    (problem,) = verify(checkpoints / "step-00000200")
    assert "rank-00000.safetensors is missing" in problem
    assert "'model/w'" in problem


def test_swapped_files_are_found(checkpoints):
    one, two = (checkpoints / f"step-00000{step}/rank-00001.safetensors" for step in (100, 200))
    data = one.read_bytes(), two.read_bytes()
    one.write_bytes(data[1])
    two.write_bytes(data[0])
    assert verify(one.parent)
    assert verify(two.parent)


def test_a_file_that_is_a_link_out_is_refused(checkpoints, tmp_path_factory):
    path = checkpoints / "step-00000200" / "rank-00001.safetensors"
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "x"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert "link" in verify(path.parent)[0]


def test_shards_that_do_not_tile_are_found(checkpoints):
    folder = checkpoints / "step-00000200"
    manifest = read_manifest(folder)
    weight = manifest.tensors["model/w"]
    fewer = {**manifest.tensors, "model/w": Stored(weight.dtype, weight.shape, weight.shards[:1])}
    damaged = Manifest(manifest.step, 2, manifest.facts, manifest.files, fewer)
    (folder / "manifest.json").write_bytes(encode_manifest(damaged))
    assert "'model/w' do not hold each element of its shape (5, 4) once" in verify(folder)[0]


def test_files_can_be_shared_out(checkpoints):
    folder = checkpoints / "step-00000200"
    (folder / "rank-00001.safetensors").unlink()
    assert [len(verify(folder, slice(rank, None, 3))) for rank in range(3)] == [0, 1, 0]
