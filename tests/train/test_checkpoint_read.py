"""Loading: by whom a checkpoint can be loaded, which are refused, and resharding between real ranks."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_helpers import checkpointer, content_of, empty_like, flip_bit, newest_verified, save, save_all, state
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from armillary.train.checkpoint_read import load, read_full
from armillary.train.store import read_manifest, verify


def test_load_fills_tensors_that_are_not_contiguous(tmp_path):
    save(tmp_path, 1)
    expected = state(1)
    found = empty_like(expected) | {"model/w": torch.zeros(5, 12).t()}
    load(tmp_path / "step-00000001", found, {"rng": torch.zeros(2, dtype=torch.uint8)}, 0, 1)
    assert torch.equal(found["model/w"], expected["model/w"])


def test_own_state_goes_to_the_same_number_of_ranks_only(tmp_path):
    save(tmp_path, 1)
    own = {"rng": torch.full((2,), 9, dtype=torch.uint8)}
    load(tmp_path / "step-00000001", empty_like(state(1)), own, 0, 2)
    assert own["rng"].tolist() == [9, 9]


def test_each_rank_gets_its_own_state_back(tmp_path):
    assert save_all(tmp_path, 50) == [None] * 3
    folder = tmp_path / "step-00000050"
    assert [content_of(folder, rank) for rank in range(3)] == [50, 50, 50]
    # From a CPU to a GPU, say, which has a generator more: nothing to give back.
    other = {"rng": torch.zeros(2, dtype=torch.uint8), "gpu": torch.zeros(1)}
    load(folder, empty_like(state(50)), other, 1, 3)
    assert not other["rng"].any()


def test_verification_is_shared_out(tmp_path):
    save_all(tmp_path, 5)
    folder = tmp_path / "step-00000005"
    flip_bit(folder / "rank-00001.safetensors")
    problems = [verify(folder, slice(rank, None, 2)) for rank in range(2)]
    assert problems[0] == []
    assert "'rank-1/rng' in rank-00001.safetensors" in problems[1][0]
    assert newest_verified(tmp_path, lambda _: None) is None


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
