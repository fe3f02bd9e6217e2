"""Saving, loading and resharding; and torture: as a script, this file kills itself at every system call of a save."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from armillary.train import checkpoint as under_test
from armillary.train.checkpoint import (
    DTYPES,
    Checkpointer,
    load,
    read_facts,
    read_full,
    tensor_names,
    verify_together,
)
from armillary.train.store import CheckpointConfig, complete, newest_verified, read_manifest, verify

DISK_CALLS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")


def state(step):
    """A state that tells its step."""
    return {
        "model/w": torch.arange(60.0).reshape(12, 5) + step,
        "model/b": torch.full((7,), step, dtype=torch.bfloat16),
        "optimizer/step": torch.tensor(float(step)),
    }


def own_state(step, rank):
    return {"rng": torch.tensor([step, rank], dtype=torch.uint8)}


def checkpointer(folder, rank=0, num_ranks=1, attempt="a", said=None, keep=2, patience=30.0):
    report = said.append if said is not None else lambda _: None
    return Checkpointer(folder, CheckpointConfig(keep=keep), rank, num_ranks, attempt, report, patience)


def save(folder, step, content=None, **kwargs):
    """Saves and waits; returns the failure."""
    writer = checkpointer(folder, **kwargs)
    content = step if content is None else content
    writer.save(step, state(content), own_state(content % 251, writer.rank), {"step": step, "content": content})
    writer.wait()
    return writer.failure


def empty_like(tensors):
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def content_of(folder, rank=0):
    """What `save` was given, loaded on as many ranks as saved it and compared in full."""
    num_ranks = read_manifest(folder).num_ranks
    content = read_facts(folder)["content"]
    expected, expected_own = state(content), own_state(content % 251, rank)
    found, own = empty_like(expected), empty_like(expected_own)
    load(folder, found, own, rank, num_ranks)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(own["rng"], expected_own["rng"])
    return content


def flip_bit(path, position=-1):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


# ---- One rank --------------------------------------------------------------------------------------------------------


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
    writer.save(1, tensors, {}, {})
    writer.wait()
    assert writer.failure is None
    found = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
    load(tmp_path / "step-00000001", found, {}, 0, 1)
    for name, tensor in tensors.items():
        one, other = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(one, other), name
        assert torch.equal(read_full(tmp_path / "step-00000001", name).reshape(-1).view(torch.uint8), other)
    assert tensor_names(tmp_path / "step-00000001") == {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}


def test_load_fills_tensors_that_are_not_contiguous(tmp_path):
    save(tmp_path, 1)
    expected = state(1)
    found = empty_like(expected) | {"model/w": torch.zeros(5, 12).t()}
    load(tmp_path / "step-00000001", found, {"rng": torch.zeros(2, dtype=torch.uint8)}, 0, 1)
    assert torch.equal(found["model/w"], expected["model/w"])


def test_the_state_is_that_of_the_call(tmp_path, monkeypatch):
    gate = threading.Event()
    write = under_test.write_tensors
    monkeypatch.setattr(under_test, "write_tensors", lambda *args: (gate.wait(10), write(*args))[1])
    writer, tensors, facts = checkpointer(tmp_path), state(5), {"step": 5, "content": 5, "nested": [1]}
    writer.save(5, tensors, own_state(5, 0), facts)
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
        writer.save(step, state(step), own_state(step, 0), {"step": step, "content": step})
    writer.wait()
    assert sorted(os.listdir(tmp_path)) == ["latest", *(f"step-0000000{step}" for step in (5, 6, 7))]
    assert [content_of(folder) for folder in complete(tmp_path)] == [7, 6, 5]


def test_a_step_that_is_reached_again_replaces_the_old(tmp_path):
    save(tmp_path, 100, content=1)
    assert save(tmp_path, 100, content=2, attempt="b") is None
    assert content_of(tmp_path / "step-00000100") == 2
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000100"]


def test_files_are_plain_safetensors(tmp_path):
    from safetensors.torch import load_file

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
        writer.save(1, {"rank-0/x": torch.zeros(1)}, {}, {})
    with pytest.raises(ValueError, match=r"'x' is torch\.complex128"):
        writer.save(1, {"x": torch.zeros(1, dtype=torch.complex128)}, {}, {})
    with pytest.raises(ValueError, match="printable"):
        writer.save(1, {"a\nb": torch.zeros(1)}, {}, {})
    with pytest.raises(ValueError):
        writer.save(1, {}, {}, {"loss": float("nan")})
    assert not tmp_path.exists() or os.listdir(tmp_path) == []


# ---- Checkpoints that are not to be believed -------------------------------------------------------------------------


def test_another_models_checkpoint_is_refused_and_nothing_is_changed(tmp_path):
    save(tmp_path, 1)
    found = {"model/w": torch.zeros(13, 5), "model/b": torch.zeros(7), "model/new": torch.zeros(1)}
    with pytest.raises(ValueError) as caught:
        load(tmp_path / "step-00000001", found, {"rng": torch.zeros(2, dtype=torch.uint8)}, 0, 1)
    for sentence in (
        "'model/new' is not in the checkpoint",
        "'optimizer/step' is only in the checkpoint",
        "'model/w' is F32 (13, 5) here and F32 (12, 5) in the checkpoint",
        "'model/b' is F32 (7,) here and BF16 (7,) in the checkpoint",
    ):
        assert sentence in str(caught.value)
    assert not any(tensor.any() for tensor in found.values())


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, path.stat().st_size - 1)])
def test_a_missing_or_cut_file_is_refused_by_load_too(tmp_path, damage):
    save(tmp_path, 1)
    damage(tmp_path / "step-00000001" / "rank-00000.safetensors")
    with pytest.raises(ValueError, match=r"rank-00000\.safetensors"):
        content_of(tmp_path / "step-00000001")
    with pytest.raises(ValueError, match=r"rank-00000\.safetensors"):
        read_full(tmp_path / "step-00000001", "model/w")


def test_a_file_that_is_not_as_the_manifest_says_is_refused(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "step-00000001" / "rank-00000.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"F32","shape":[12,5]', b'"F32","shape":[6,10]'))
    with pytest.raises(ValueError, match="'model/w' otherwise than the manifest says"):
        content_of(path.parent)
    path.write_bytes(b"\xff" * 8 + data[8:])
    with pytest.raises(ValueError, match="cannot be read"):
        content_of(path.parent)


def test_an_unknown_tensor_is_named(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match="has no tensor 'x'"):
        read_full(tmp_path / "step-00000001", "x")


def test_own_state_goes_to_the_same_number_of_ranks_only(tmp_path):
    save(tmp_path, 1)
    own = {"rng": torch.full((2,), 9, dtype=torch.uint8)}
    load(tmp_path / "step-00000001", empty_like(state(1)), own, 0, 2)
    assert own["rng"].tolist() == [9, 9]


# ---- Failures while saving -------------------------------------------------------------------------------------------


def full_disk(tensors, path):
    Path(path).write_bytes(b"x" * 100)
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def expect_full_disk(folder, failure, said):
    """The disk was full: it was said once and clearly, older checkpoints stay, nothing is left over."""
    assert said == [failure]
    assert "step-00000200 was not saved" in failure
    assert f"disk of {folder} is full" in failure
    assert "checkpoint.keep" in failure
    assert content_of(newest_verified(folder, pytest.fail)) == 100
    assert sorted(os.listdir(folder)) == ["latest", "step-00000100"]


def test_full_disk(tmp_path, monkeypatch):
    save(tmp_path, 100)
    said = []
    with monkeypatch.context() as patch:
        patch.setattr(under_test, "save_file", full_disk)
        failure = save(tmp_path, 200, said=said)
    expect_full_disk(tmp_path, failure, said)
    assert save(tmp_path, 300) is None


@pytest.mark.parametrize("call", range(1, 5))
def test_full_disk_at_any_later_moment(tmp_path, monkeypatch, call):
    save(tmp_path, 100)
    said, calls, fsync = [], [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) >= call:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        failure = save(tmp_path, 200, said=said)
    expect_full_disk(tmp_path, failure, said)


def test_full_disk_after_publishing_is_no_failure(tmp_path, monkeypatch):
    def full(path, data, write=under_test.write_aside):
        if path.name == "latest":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(under_test, "write_aside", full)
    said = []
    assert save(tmp_path, 200, said=said) is None
    assert content_of(newest_verified(tmp_path, pytest.fail)) == 200
    assert "step-00000200 is saved, but" in said[0]


@pytest.mark.lab
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a file system")
def test_full_disk_in_earnest(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        save(tmp_path, 100)
        said = []
        writer = checkpointer(tmp_path, said=said)
        writer.save(200, {"model/w": torch.zeros(1_000_000)}, {}, {})
        writer.wait()
        expect_full_disk(tmp_path, writer.failure, said)
        assert "needs 4.0 MB" in writer.failure
        assert save(tmp_path, 300) is None
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_write_that_does_not_come_back_is_a_failure(tmp_path, monkeypatch):
    def lies(tensors, path, write=under_test.save_file):
        write(tensors, path)
        flip_bit(Path(path))

    save(tmp_path, 100)
    monkeypatch.setattr(under_test, "save_file", lies)
    failure = save(tmp_path, 200)
    assert "not what comes back" in failure
    assert content_of(newest_verified(tmp_path, pytest.fail)) == 100


def test_a_folder_that_cannot_be_made_is_a_failure(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    failure = save(tmp_path / "checkpoints", 1)
    assert "step-00000001 was not saved" in failure


def test_a_disk_too_full_for_a_folder_is_a_failure(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", full)
        failure = save(tmp_path / "checkpoints", 1)
    assert f"disk of {tmp_path / 'checkpoints'} is full" in failure


# ---- Several ranks, without a process group --------------------------------------------------------------------------


def save_all(folder, step, num_ranks=3, **kwargs):
    """Saves from several ranks at once, each in its thread; returns every rank's failure."""
    writers = [checkpointer(folder, rank, num_ranks, **kwargs) for rank in range(num_ranks)]
    for writer in reversed(writers):
        writer.save(step, state(step), own_state(step, writer.rank), {"step": step, "content": step})
    for writer in writers:
        writer.wait()
    return [writer.failure for writer in writers]


def test_each_rank_gets_its_own_state_back(tmp_path):
    assert save_all(tmp_path, 50) == [None] * 3
    folder = tmp_path / "step-00000050"
    assert [content_of(folder, rank) for rank in range(3)] == [50, 50, 50]
    with pytest.raises(ValueError, match="'rank-1/rng' is only in the checkpoint"):
        load(folder, empty_like(state(50)), {}, 1, 3)


def test_a_rank_that_fails_is_named_and_the_folder_is_removed(tmp_path, monkeypatch):
    save_all(tmp_path, 100)

    def fails(tensors, path, write=under_test.save_file):
        (full_disk if "rank-00001" in str(path) else write)(tensors, path)

    monkeypatch.setattr(under_test, "save_file", fails)
    said = []
    failures = save_all(tmp_path, 200, said=said)
    assert "rank 1: the disk of" in failures[0]
    assert "this rank's part of step-00000200 was not saved" in failures[1]
    assert failures[2] is None
    assert sorted(said) == sorted(failures[:2])
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000100"]


def test_a_rank_that_never_comes_is_named(tmp_path):
    failure = save(tmp_path, 100, num_ranks=2, patience=0.05)
    assert "rank 1: nothing came within 0.05 s" in failure
    assert "share" in failure
    assert os.listdir(tmp_path) == []


def test_a_plain_tensor_that_rank_0_lacks_is_a_failure(tmp_path):
    writers = [checkpointer(tmp_path, rank, 2) for rank in range(2)]
    for writer in writers:
        extra = {"model/extra": torch.ones(2)} if writer.rank else {}
        writer.save(1, state(1) | extra, {}, {})
    for writer in writers:
        writer.wait()
    assert "'model/extra'" in writers[0].failure


def test_verification_is_shared_out(tmp_path):
    save_all(tmp_path, 5)
    folder = tmp_path / "step-00000005"
    flip_bit(folder / "rank-00001.safetensors")
    problems = [verify_together(folder, rank, 2) for rank in range(2)]
    assert problems[0] == []
    assert "'rank-1/rng' in rank-00001.safetensors" in problems[1][0]
    assert newest_verified(tmp_path, lambda _: None) is None


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


# ---- Resharding ------------------------------------------------------------------------------------------------------


def full_tensors():
    generator = torch.Generator().manual_seed(1)
    return {
        "model/uneven": torch.randn(7, 5, generator=generator),
        "model/small": torch.randn(2, 3, generator=generator),
        "model/one": torch.randn(1, generator=generator, dtype=torch.float64),
        "model/half": torch.randn(5, 4, generator=generator).bfloat16(),
        "model/wide": torch.randn(3, 11, generator=generator),
        "model/cube": torch.randn(4, 3, 5, generator=generator),
        "optimizer/counts": torch.arange(10),
        "optimizer/bytes": torch.arange(9, dtype=torch.uint8),
        "optimizer/scalar": torch.tensor(4.0),
        "plain/step": torch.tensor(12.0),
        "plain/table": torch.randn(3, 4, generator=generator).t(),
    }


def sharded(tensors, mesh, dim=0):
    """Plain tensors stay plain, scalars are replicated, the others sharded."""
    result = {}
    for name, tensor in tensors.items():
        if name.startswith("plain/"):
            result[name] = tensor.clone()
        elif tensor.ndim == 0:
            result[name] = distribute_tensor(tensor, mesh, [Replicate()])
        else:
            result[name] = distribute_tensor(tensor, mesh, [Shard(dim % tensor.ndim)])
    return result


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_on_three_ranks(rank, folder):
    mesh = init_device_mesh("cpu", (3,))
    writer = checkpointer(Path(folder), rank, 3)
    writer.save(10, sharded(full_tensors(), mesh), {"rng": torch.tensor([rank])}, {"rank": rank})
    writer.wait()
    return writer.failure


def load_on(num_ranks, rank, folder, dim):
    """Loads on the first `num_ranks` ranks of this world, sharded over another dim; returns what is wrong."""
    mesh = DeviceMesh("cpu", list(range(num_ranks)))
    if rank >= num_ranks:
        return []
    expected = sharded(full_tensors(), mesh, dim)
    found = sharded(empty_like(full_tensors()), mesh, dim)
    own = {"rng": torch.tensor([99])}
    facts = load(Path(folder), found, own, rank, num_ranks)
    assert facts == {"rank": 0}
    assert own["rng"].item() == (rank if num_ranks == 3 else 99)
    return [
        f"{num_ranks} ranks: {name}" for name in expected if not torch.equal(local(found[name]), local(expected[name]))
    ]


def hybrid_tensors(mesh):
    """FSDP over tensor parallelism (strided shards), hybrid sharding (replicas), grids, stages: whole and sharded."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    full = {f"model/{name}": tensor.detach().clone() for name, tensor in model.named_parameters()}
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    grid, stage = torch.arange(35.0).reshape(5, 7), mesh.get_local_rank("dp")
    shared = {f"model/{name}": tensor for name, tensor in model.named_parameters()}
    shared["grid"] = distribute_tensor(grid, mesh, [Shard(0), Shard(1)])
    shared["nested"] = distribute_tensor(grid, mesh, [Shard(0), Shard(0)])
    shared["hybrid"] = distribute_tensor(grid, mesh, [Replicate(), Shard(0)])
    shared[f"stage{stage}"] = distribute_tensor(grid + stage, mesh["tp"], [Shard(0)])
    return full | dict.fromkeys(("grid", "nested", "hybrid", "stage0"), grid) | {"stage1": grid + 1}, shared


def save_and_load_hybrid(rank, mesh, folder):
    """Saves, and loads with the axes swapped; returns what is wrong."""
    full, shared = hybrid_tensors(mesh)
    writer = checkpointer(folder, rank, 4)
    writer.save(1, shared, {}, {})
    writer.wait()
    assert writer.failure is None, writer.failure
    dist.barrier()
    checkpoint = folder / "step-00000001"
    places = {name: [Shard(tensor.ndim - 1), Shard(0)] for name, tensor in full.items()}
    expected = {name: distribute_tensor(tensor, mesh, places[name]) for name, tensor in full.items()}
    found = {name: distribute_tensor(torch.zeros_like(tensor), mesh, places[name]) for name, tensor in full.items()}
    load(checkpoint, found, {}, rank, 4)
    wrong = [f"{name} in part" for name in full if not torch.equal(local(found[name]), local(expected[name]))]
    wrong += [f"{name} in full" for name in full if not torch.equal(read_full(checkpoint, name), full[name])]
    writers = [shard.file for shard in read_manifest(checkpoint).tensors["hybrid"].shards]
    return wrong + (
        [] if writers == [f"rank-0000{r}.safetensors" for r in (0, 1)] else [f"replicas written: {writers}"]
    )


def save_what_is_no_box(rank, mesh, folder):
    """The messages: strided rows that do not divide, a partial sum, and a mesh that does not say who writes."""
    model = nn.Sequential(nn.Linear(6, 5))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    partial = DTensor.from_local(torch.ones(2), mesh, [Partial(), Replicate()])
    messages = []
    for name, tensor in {"strided": model[0].weight, "partial": partial}.items():
        with pytest.raises(ValueError) as caught:
            checkpointer(folder, rank, 4).save(1, {name: tensor}, {}, {})
        messages.append(str(caught.value))
    writer = checkpointer(folder, rank, 4)
    writer.save(1, {"twice": distribute_tensor(torch.ones(4), mesh["tp"], [Shard(0)])}, {}, {})
    writer.wait()
    return [*messages, writer.failure]


def on_four_ranks(rank, saved_on_three, folder):
    """All that four ranks have to show, in one world."""
    folder = Path(folder)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    checkpoint = str(Path(saved_on_three) / "step-00000010")
    return {
        "resharded": [load_on(num_ranks, rank, checkpoint, dim) for num_ranks, dim in ((1, 0), (2, 1), (3, 0), (4, 0))],
        "hybrid": save_and_load_hybrid(rank, mesh, folder / "hybrid"),
        "no box": save_what_is_no_box(rank, mesh, folder / "no box"),
    }


@pytest.fixture(scope="module")
def saved_on_three(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    assert world(save_on_three_ranks, 3, str(folder)) == [None] * 3
    return folder


@pytest.fixture(scope="module")
def four(world, saved_on_three, tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    return folder, world(on_four_ranks, 4, str(saved_on_three), str(folder))


def test_saved_on_three_ranks_loaded_on_any_number(saved_on_three, four):
    folder = saved_on_three / "step-00000010"
    assert verify(folder) == []
    for rank in four[1]:
        assert rank["resharded"] == [[]] * 4
    for name, tensor in full_tensors().items():
        assert torch.equal(read_full(folder, name), tensor)
    found = empty_like(full_tensors())
    load(folder, found, {}, 0, 1)
    assert all(torch.equal(found[name], tensor) for name, tensor in full_tensors().items())


def test_a_rank_opens_only_the_files_it_needs(saved_on_three, tmp_path):
    folder = tmp_path / "step-00000010"
    shutil.copytree(saved_on_three / "step-00000010", folder)
    for name in ("rank-00001.safetensors", "rank-00002.safetensors"):
        (folder / name).unlink()
    assert torch.equal(read_full(folder, "plain/step"), torch.tensor(12.0))
    with pytest.raises(ValueError, match=r"rank-00001\.safetensors is missing"):
        read_full(folder, "model/uneven")


def test_shards_of_two_mesh_axes(four):
    assert [rank["hybrid"] for rank in four[1]] == [[]] * 4


def test_what_is_no_box_is_refused(four):
    folder, ranks = four
    strided, partial, twice = ranks[0]["no box"]
    assert "'strided' (5, 6)" in strided
    assert "'partial' is a partial sum" in partial
    assert "4 shards of tensor 'twice' do not hold each element" in twice
    assert os.listdir(folder / "no box") == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_state_on_a_gpu(tmp_path):
    tensors = {name: tensor.cuda() for name, tensor in full_tensors().items()}
    writer = checkpointer(tmp_path)
    for step in (1, 2):
        for tensor in tensors.values():
            tensor.add_(1)
        writer.save(step, tensors, {"rng": torch.cuda.get_rng_state()}, {})
    writer.wait()
    assert writer.failure is None
    found = empty_like(tensors)
    load(tmp_path / "step-00000002", found, {"rng": torch.zeros_like(torch.cuda.get_rng_state())}, 0, 1)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


# ---- Torture ---------------------------------------------------------------------------------------------------------


def kill_at(moment, torn):
    """From now on, the call number `moment` of those that change the disk kills this process before it is done.

    `torn`: what was about to be synced then is lost by half, as in a power cut.
    """
    calls = [0]

    def dying(original, name):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == moment:
                if torn and name == "fsync":
                    path = os.readlink(f"/proc/self/fd/{args[0]}")
                    if os.path.isfile(path):
                        os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in DISK_CALLS:
        setattr(os, name, dying(getattr(os, name), name))


def in_child(work):
    """Runs `work` in a forked process; returns whether it lived to its end."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(3)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), f"the child failed: {status}"
    return status == 0


def prepared(folder, steps):
    shutil.rmtree(folder, ignore_errors=True)
    for step in steps:
        assert save(folder, step, keep=9) is None


def recovers(folder, allowed, keep):
    """After a kill: the newest verified checkpoint is a whole one of those allowed, and the next save is as ever."""
    content = content_of(newest_verified(folder, lambda _: None))
    assert content in allowed, (content, allowed)
    assert save(folder, 900, attempt="next", keep=keep) is None
    assert content_of(newest_verified(folder, pytest.fail)) == 900
    extra = [name for name in os.listdir(folder) if ".tmp-" in name or ".old-" in name or name.endswith(".aside")]
    assert not extra, extra


def torture_one_rank(folder, before, step, content, keep, torn):
    """Kills one save at every moment; returns how many moments there were."""
    template = folder / "template"
    prepared(template, before)
    for moment in range(1, 1000):
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(template, run)

        def work(run=run, moment=moment):
            kill_at(moment, torn)
            save(run, step, content=content, attempt="killed", keep=keep)

        survived = in_child(work)
        recovers(run, {content} if survived else {before[-1], content}, keep)
        if survived:
            return moment - 1
    raise AssertionError("the save never ended")


def torture_two_ranks(folder, victim):
    """Kills one of two ranks at every moment: rank 0 beside a rank 1 that goes on, rank 1 before rank 0 begins."""
    for moment in range(1, 1000):
        run = folder / "run"
        prepared(run, [100])

        def work(rank, run=run, moment=moment):
            if rank == victim:
                kill_at(moment, False)
            save(run, 200, rank=rank, num_ranks=2, attempt="killed", patience=0.05 if victim else 30)

        if victim:
            survived = in_child(lambda: work(1))
            assert in_child(lambda: work(0))
        else:
            other = os.fork()
            if other == 0:
                work(1)
                os._exit(0)
            survived = in_child(lambda: work(0))
            os.waitpid(other, 0)
        newest = newest_verified(run, pytest.fail)
        found = content_of(newest)
        assert found in ({200} if survived else {100, 200}), (moment, found)
        if victim and newest.name == "step-00000100":
            assert sorted(os.listdir(run)) == ["latest", "step-00000100"], "rank 0 removes what it cannot finish"
        recovers(run, {100, 200}, 2)
        if survived:
            return moment - 1
    raise AssertionError("the save never ended")


def torture_at_random(folder, rounds):
    """Kills a process that saves without pause, at random moments, large tensors included; returns the last step."""
    generator, last = random.Random(0), 0

    def big(step):
        return {"model/w": torch.full((1_500_000,), float(step)), "optimizer/step": torch.tensor(step)}

    def work(first):
        writer = checkpointer(folder, attempt=f"from{first}")
        for step in range(first, first + 10_000):
            writer.save(step, big(step), {}, {"step": step})

    for _ in range(rounds):
        child = os.fork()
        if child == 0:
            work(last + 1)
        time.sleep(0.05 + 0.25 * generator.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        newest = newest_verified(folder, pytest.fail)
        if newest is None:
            continue
        found = empty_like(big(0))
        step = load(newest, found, {}, 0, 1)["step"]
        assert step >= last
        last = step
        assert all(torch.equal(found[name], tensor) for name, tensor in big(step).items())
    return last


TORTURES = {
    "next step": lambda folder: torture_one_rank(folder, [100], 200, 200, 2, False),
    "next step, torn": lambda folder: torture_one_rank(folder, [100], 200, 200, 2, True),
    "next step, pruning": lambda folder: torture_one_rank(folder, [50, 100], 200, 200, 1, False),
    "same step": lambda folder: torture_one_rank(folder, [50, 100], 100, 101, 1, False),
    "same step, torn": lambda folder: torture_one_rank(folder, [50, 100], 100, 101, 1, True),
    "first of two ranks": lambda folder: torture_two_ranks(folder, 0),
    "second of two ranks": lambda folder: torture_two_ranks(folder, 1),
    "at random": lambda folder: torture_at_random(folder, 20),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_at_any_moment_the_newest_complete_one_is_found(tmp_path):
    """One process for all tortures, because it forks: it must not have the threads of a test session.

    In memory where that is possible: a kill takes nothing that was written, synced or not (`torn` plays the power cut).
    """
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as folder:
        answer = subprocess.run(
            [sys.executable, __file__, folder],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    moments = json.loads(answer.stdout)
    assert moments.pop("at random") > 5
    assert min(moments.values()) >= 4, moments
    assert sum(moments.values()) >= 90, moments


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {}
    for title, torture in TORTURES.items():
        place = Path(sys.argv[1]) / title.replace(" ", "-")
        place.mkdir()
        results[title] = torture(place)
    print(json.dumps(results))
