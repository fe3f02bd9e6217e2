"""Saving: what comes to lie on disk, in which order, and what is refused."""

import os
import threading
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import checkpointer, content_of, own_state, plain, save, state
from safetensors.torch import load_file

from armillary.train.checkpoint import save as under_test
from armillary.train.checkpoint.load import load, read_facts, read_full
from armillary.train.checkpoint.local_part import DTYPES
from armillary.train.checkpoint.store import complete, read_manifest


def test_round_trip(tmp_path):
    assert save(tmp_path, 100) is None
    folder = tmp_path / "step-00000100"
    assert content_of(folder) == 100
    assert (tmp_path / "latest").read_text() == "step-00000100\n"
    assert sorted(os.listdir(folder)) == ["manifest.json", "rank-00000.safetensors"]
    assert read_facts(folder) == {"step": 100, "content": 100}


def test_every_dtype_and_layout_comes_back_bit_for_bit(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        noise = torch.randint(0, 256, (6, 8, dtype.itemsize), dtype=torch.uint8, generator=generator)
        tensors[name] = (noise % 2).bool()[..., 0] if dtype is torch.bool else noise.view(dtype)[..., 0]
    numbers = torch.arange(24.0).reshape(4, 6)
    tensors |= {
        "transposed": numbers.t(),
        "strided": numbers[::2, 1::3],
        "expanded": torch.tensor([2.0]).expand(5),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 3),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
    }
    writer = checkpointer(tmp_path)
    writer.save(1, plain(tensors), {}, {})
    writer.wait()
    assert writer.failure is None
    found = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
    load(tmp_path / "step-00000001", plain(found), {}, 0, 1)
    for name, tensor in tensors.items():
        one, other = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(one, other), name
        assert torch.equal(read_full(tmp_path / "step-00000001", name).reshape(-1).view(torch.uint8), other)


def test_the_state_is_that_of_the_call(tmp_path, monkeypatch):
    gate = threading.Event()
    write = under_test.write_tensors
    monkeypatch.setattr(under_test, "write_tensors", lambda *args: (gate.wait(10), write(*args))[1])
    writer, tensors, facts = checkpointer(tmp_path), state(5), {"step": 5, "content": 5, "nested": [1]}
    writer.save(5, plain(tensors), own_state(5, 0), facts)
    for tensor in tensors.values():
        tensor.zero_()
    facts["nested"].append(2)
    gate.set()
    writer.wait()
    assert content_of(tmp_path / "step-00000005") == 5
    assert read_facts(tmp_path / "step-00000005")["nested"] == [1]


def test_saves_in_a_row_wait_for_each_other_and_keep_the_newest(tmp_path):
    writer = checkpointer(tmp_path, keep=3)
    for step in range(1, 8):
        writer.save(step, plain(state(step)), own_state(step, 0), {"step": step, "content": step})
    writer.wait()
    assert sorted(os.listdir(tmp_path)) == ["latest", *(f"step-0000000{step}" for step in (5, 6, 7))]
    assert [content_of(folder) for folder in complete(tmp_path)] == [7, 6, 5]


def test_a_step_that_is_reached_again_replaces_the_old(tmp_path):
    save(tmp_path, 100, content=1)
    assert save(tmp_path, 100, content=2, attempt="b") is None
    assert content_of(tmp_path / "step-00000100") == 2
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000100"]


def test_files_are_plain_safetensors(tmp_path):
    save(tmp_path, 3)
    tensors = load_file(tmp_path / "step-00000003" / "rank-00000.safetensors")
    assert torch.equal(tensors["model/w"], state(3)["model/w"])


def test_weights_of_two_runs_are_compared_by_one_string(tmp_path):
    for number, step in enumerate((8, 8, 9)):
        save(tmp_path / str(number), step)
    same, again, other = (read_manifest(complete(tmp_path / str(number))[0]).weights for number in range(3))
    assert same == again
    assert same != other


def test_names_dtypes_and_facts_that_cannot_be_stored_are_refused(tmp_path):
    writer = checkpointer(tmp_path)
    with pytest.raises(ValueError, match="rank's own state"):
        writer.save(1, plain({"rank-0/x": torch.zeros(1)}), {}, {})
    with pytest.raises(ValueError, match=r"/x' is torch\.complex128"):
        writer.save(1, {}, {"x": torch.zeros(1, dtype=torch.complex128)}, {})
    with pytest.raises(ValueError, match="printable"):
        writer.save(1, plain({"a\nb": torch.zeros(1)}), {}, {})
    with pytest.raises(ValueError):
        writer.save(1, {}, {}, {"loss": float("nan")})
    assert not tmp_path.exists() or os.listdir(tmp_path) == []


def test_a_rank_that_never_comes_is_named(tmp_path):
    failure = save(tmp_path, 100, num_ranks=2, patience=0.05)
    assert "rank 1: nothing came within 0.05 s" in failure
    assert "share" in failure
    assert os.listdir(tmp_path) == []


def test_a_tensor_that_no_rank_writes_is_a_failure(tmp_path):
    writers = [checkpointer(tmp_path, rank, 2) for rank in range(2)]
    for writer in writers:
        extra = {"model/extra": torch.ones(2)} if writer.rank else {}
        writer.save(1, plain(state(1) | extra, writer.rank), {}, {})
    for writer in writers:
        writer.wait()
    assert "'model/extra'" in writers[0].failure


def test_everything_is_synced_before_its_name_is_given(tmp_path, monkeypatch):
    """What a power cut could lose is on disk by then: files before their folder is renamed, it before `latest`."""
    events = []

    def record(call, path_of):
        original = getattr(os, call)

        def recorded(*args):
            events.append((call, path_of(*args)))
            return original(*args)

        monkeypatch.setattr(os, call, recorded)

    save(tmp_path, 1)
    record("fsync", lambda descriptor: Path(os.readlink(f"/proc/self/fd/{descriptor}")))
    record("rename", lambda source, target: Path(target))
    record("replace", lambda source, target: Path(target))
    save(tmp_path, 2, attempt="power")
    unfinished, final = tmp_path / "step-00000002.tmp-power-1", tmp_path / "step-00000002"
    order = [
        ("fsync", unfinished / "rank-00000.safetensors"),
        ("replace", unfinished / "rank-00000.json"),
        ("replace", unfinished / "manifest.json"),
        ("fsync", unfinished),
        ("rename", final),
        ("fsync", tmp_path),
        ("replace", tmp_path / "latest"),
    ]
    position = 0
    for event in order:
        assert event in events[position:], f"{event} not after {events[:position]}"
        position = events.index(event, position) + 1
    for position, (call, path) in enumerate(events):
        if call == "replace":
            aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
            assert ("fsync", aside) in events[:position], f"{path} was renamed before it was synced"
