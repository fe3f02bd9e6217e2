import errno
import io
import json
import os
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest
from checkpoint_helpers import newest_verified
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from armillary.train.checkpoint import store
from armillary.train.checkpoint.shards import Box, Manifest, Shard, Stored, StoredFile, encode_manifest
from armillary.train.checkpoint.store import (
    complete,
    prune,
    publish,
    read_header,
    read_manifest,
    safe_join,
    sweep,
    verify,
    write_aside,
    write_json,
)

DTYPES = {"float32": "F32", "int64": "I64"}


def make_checkpoint(folder, step, value=0.0):
    """A checkpoint of two ranks: `model/w` split between them, `model/b` on the first."""
    folder.mkdir(parents=True)
    weight = np.arange(20, dtype=np.float32).reshape(5, 4) + value
    held = [
        {"model/w": (Box((0, 0), (3, 4)), weight[:3]), "model/b": (Box((), ()), np.array(step))},
        {"model/w": (Box((3, 0), (2, 4)), weight[3:])},
    ]
    files, shards = {}, {}
    for rank, tensors in enumerate(held):
        path = folder / f"rank-{rank:05d}.safetensors"
        save_file({name: array.copy() for name, (_, array) in tensors.items()}, path)
        with open(path, "rb") as file:
            entries, header = read_header(file, path.stat().st_size)
            files[path.name] = StoredFile(path.stat().st_size, header)
            for name, (box, _) in tensors.items():
                checksum = store.checksum_of(file, entries[name].start, entries[name].num_bytes)
                shards.setdefault(name, []).append(Shard(path.name, box, checksum))
    tensors = {
        "model/w": Stored("F32", (5, 4), tuple(shards["model/w"])),
        "model/b": Stored("I64", (), tuple(shards["model/b"])),
    }
    (folder / "manifest.json").write_bytes(encode_manifest(Manifest(step, 2, {"step": step}, files, tensors)))
    return folder


@pytest.fixture
def checkpoints(tmp_path):
    """Steps 100 and 200."""
    make_checkpoint(tmp_path / "step-00000100", 100)
    make_checkpoint(tmp_path / "step-00000200", 200, value=0.5)
    return tmp_path


def test_imports_no_torch():
    code = "import sys, armillary.train.checkpoint.store; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- Files -----------------------------------------------------------------------------------------------------------


def test_write_aside_replaces_a_file(tmp_path):
    write_aside(tmp_path / "a", b"old")
    write_aside(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_write_aside_that_fails_leaves_the_old_content_alone(tmp_path, monkeypatch, call):
    write_aside(tmp_path / "a", b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        write_aside(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_write_json_refuses_what_json_cannot_hold(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, None]}
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", float("nan"))


def test_safe_join_takes_plain_names(tmp_path):
    assert safe_join(tmp_path, "rank-00000.safetensors") == tmp_path / "rank-00000.safetensors"
    assert safe_join(tmp_path, "a/b..c") == tmp_path / "a" / "b..c"


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "..", "a/../../b", "./a", "a//b", "a\\..\\b", "C:/x", "a\0b", "a/"]
)
def test_safe_join_refuses_escapes(tmp_path, name):
    with pytest.raises(ValueError):
        safe_join(tmp_path, name)


def test_safe_join_refuses_links_that_lead_out(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "out").symlink_to(tmp_path)
    (inside / "file").symlink_to("/etc/passwd")
    (inside / "good").symlink_to(inside)
    for name in ("out/x", "out", "file"):
        with pytest.raises(ValueError, match="link"):
            safe_join(inside, name)
    assert safe_join(inside, "good/x") == inside / "good/x"


@given(st.lists(st.sampled_from(["..", ".", "", "a", "b", "/", "~", "C:", "\0"]), max_size=6).map("/".join))
def test_safe_join_never_leaves_the_folder(tmp_path_factory, name):
    folder = tmp_path_factory.getbasetemp()
    try:
        path = safe_join(folder, name)
    except ValueError:
        return
    assert path.resolve().is_relative_to(folder.resolve())
    assert path != folder


# ---- Headers ---------------------------------------------------------------------------------------------------------


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


# ---- The folder of checkpoints ---------------------------------------------------------------------------------------


def test_newest_first_and_only_complete_ones(checkpoints):
    for name in ("step-00000300.tmp-a-1", "step-12", "other"):
        (checkpoints / name).mkdir()
    make_checkpoint(checkpoints / "step-00000200.old-a-1", 200)
    make_checkpoint(checkpoints / "step-100000000", 100000000)
    assert [path.name for path in complete(checkpoints)] == [
        "step-100000000",
        "step-00000200",
        "step-00000200.old-a-1",
        "step-00000100",
    ]
    assert complete(checkpoints / "nowhere") == []


def test_a_damaged_one_is_reported_and_the_one_before_is_used(checkpoints):
    (checkpoints / "step-00000200" / "manifest.json").unlink()
    said = []
    assert newest_verified(checkpoints, said.append).name == "step-00000100"
    assert len(said) == 1
    assert "step-00000200" in said[0]
    assert "manifest.json is missing" in said[0]


def test_none_is_sound(checkpoints, tmp_path_factory):
    for folder in complete(checkpoints):
        (folder / "rank-00000.safetensors").unlink()
    said = []
    assert newest_verified(checkpoints, said.append) is None
    assert len(said) == 2
    assert newest_verified(tmp_path_factory.mktemp("empty"), said.append) is None


@pytest.mark.parametrize("content", ["step-00000100\n", "step-99999999\n", "../..\n", ""])
def test_the_pointer_is_not_believed(checkpoints, content):
    (checkpoints / "latest").write_text(content)
    assert newest_verified(checkpoints, pytest.fail).name == "step-00000200"


def test_publish_replaces_the_same_step(checkpoints):
    unfinished = make_checkpoint(checkpoints / "step-00000200.tmp-a-1", 200, value=7)
    published = publish(unfinished, 200)
    assert published.name == "step-00000200"
    assert [path.name for path in complete(checkpoints)][:2] == ["step-00000200", "step-00000200.old-a-1"]
    assert prune(published, keep=2) == [checkpoints / "step-00000200.old-a-1"]
    assert sorted(os.listdir(checkpoints)) == ["step-00000100", "step-00000200"]


def test_publish_that_fails_puts_the_old_one_back(checkpoints, monkeypatch):
    unfinished = make_checkpoint(checkpoints / "step-00000200.tmp-a-1", 200, value=7)
    rename = os.rename

    def fails(source, target):
        if source == unfinished:
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="No space left"):
        publish(unfinished, 200)
    assert sorted(os.listdir(checkpoints)) == ["step-00000100", "step-00000200", "step-00000200.tmp-a-1"]


@pytest.mark.parametrize(
    ("published", "keep", "left"), [(300, 1, [300]), (300, 2, [200, 300]), (300, 9, [100, 200, 300]), (150, 1, [150])]
)
def test_prune_keeps_the_published_and_those_before(checkpoints, published, keep, left):
    folder = make_checkpoint(checkpoints / f"step-{published:08d}", published)
    prune(folder, keep)
    assert sorted(os.listdir(checkpoints)) == [f"step-{step:08d}" for step in left]


def test_sweep_removes_what_others_left_but_not_a_save_in_progress(checkpoints):
    for name in ("other-9", "mine-1", "mine-2", "mine-3"):
        (checkpoints / f"step-00000300.tmp-{name}").mkdir()
    (checkpoints / ".latest.123.aside").touch()
    sweep(checkpoints, "mine", 2)
    assert sorted(os.listdir(checkpoints)) == [
        "step-00000100",
        "step-00000200",
        "step-00000300.tmp-mine-2",
        "step-00000300.tmp-mine-3",
    ]
