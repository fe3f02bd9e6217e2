"""Loading: by whom a checkpoint can be loaded, which are refused, and resharding (whole runs: test_crossings.py)."""

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import (
    checkpointer,
    content_of,
    empty_like,
    flip_bit,
    newest_verified,
    plain,
    save,
    save_all,
    state,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from armillary.parallel.cut import Cut
from armillary.parallel.tensor.cuts import tensor_cuts
from armillary.train.checkpoint.boxes import Box, tiles
from armillary.train.checkpoint.load import load, read_full
from armillary.train.checkpoint.local_part import DTYPE_NAMES, Local
from armillary.train.checkpoint.manifest import reads
from armillary.train.checkpoint.store import read_manifest
from armillary.train.checkpoint.verify import verify
from armillary.train.model.shape import ModelConfig
from armillary.train.model.transformer import Transformer


def test_load_fills_tensors_that_are_not_contiguous(tmp_path):
    save(tmp_path, 1)
    expected = state(1)
    found = empty_like(expected) | {"model/w": torch.zeros(5, 12).t()}
    load(tmp_path / "step-00000001", plain(found), {"rng": torch.zeros(2, dtype=torch.uint8)}, 0, 1)
    assert torch.equal(found["model/w"], expected["model/w"])


def test_own_state_goes_to_the_same_number_of_ranks_only(tmp_path):
    save(tmp_path, 1)
    own = {"rng": torch.full((2,), 9, dtype=torch.uint8)}
    load(tmp_path / "step-00000001", plain(empty_like(state(1))), own, 0, 2)
    assert own["rng"].tolist() == [9, 9]


def test_each_rank_gets_its_own_state_back(tmp_path):
    assert save_all(tmp_path, 50) == [None] * 3
    folder = tmp_path / "step-00000050"
    assert [content_of(folder, rank) for rank in range(3)] == [50, 50, 50]
    # From a CPU to a GPU, say, which has a generator more: nothing to give back.
    other = {"rng": torch.zeros(2, dtype=torch.uint8), "gpu": torch.zeros(1)}
    load(folder, plain(empty_like(state(50))), other, 1, 3)
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
        load(tmp_path / "step-00000001", plain(found), {"rng": torch.zeros(2, dtype=torch.uint8)}, 0, 1)
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
    """Shapes that few numbers of ranks divide."""
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
        "plain/table": torch.randn(3, 4, generator=generator).t(),
    }


@dataclass(frozen=True)
class Grid:
    """Ranks of a pipeline, each with a data plane, each of whose ranks is a group of tensor ranks."""

    stages: int = 1
    plane: int = 1
    tensor: int = 1
    dim: int = 0
    """What the tensor ranks divide, where a tensor has it."""

    @property
    def num_ranks(self):
        return self.stages * self.plane * self.tensor

    def parts(self, tensors, rank):
        """A rank's parts of whole tensors: those of its stage, the first of them held by all tensor ranks."""
        stage, rest = divmod(rank, self.plane * self.tensor)
        index, number = divmod(rest, self.tensor)
        parts = {}
        for position, (name, tensor) in enumerate(tensors.items()):
            if position % self.stages != stage:
                continue
            shape, writes = tuple(tensor.shape), index == number == 0
            box = Box((0,) * len(shape), shape)
            if shape and not name.startswith("plain/"):
                dim = min(self.dim, len(shape) - 1)
                cut = Cut.whole(shape, self.tensor) if position < 2 else Cut.even(shape, dim, self.tensor)
                box, writes = Box(*cut.shard(number, index, self.plane)), cut.speaks(number)
            data = tensor[box.slices(Box((0,) * len(shape), shape))] if shape else tensor
            parts[name] = Local(DTYPE_NAMES[tensor.dtype], shape, box, data.clone(), writes)
        return parts

    def save(self, folder, tensors):
        writers = [checkpointer(folder, rank, self.num_ranks) for rank in range(self.num_ranks)]
        for writer in reversed(writers):
            own = {"rng": torch.tensor([writer.rank])}
            writer.save(10, self.parts(tensors, writer.rank), own, {"rank": writer.rank})
        for writer in writers:
            writer.wait()
        return [writer.failure for writer in writers]

    def load(self, folder, tensors, rank):
        """Loads on a rank; returns its parts and its own state, and checks that every element is there."""
        found, own = self.parts(empty_like(tensors), rank), {"rng": torch.tensor([99])}
        facts = load(folder, found, own, rank, self.num_ranks, lambda name: name in tensors)
        assert facts == {"rank": 0}
        wrong = [n for n, part in self.parts(tensors, rank).items() if not torch.equal(found[n].data, part.data)]
        assert not wrong, (self, rank, wrong)
        return found, own


GRIDS = [
    Grid(),
    Grid(plane=3),
    Grid(plane=2, tensor=2),
    Grid(plane=2, tensor=2, dim=1),
    Grid(stages=2, tensor=3, dim=1),
    Grid(stages=3, plane=2),
    Grid(plane=13),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint from every grid."""
    folders = [tmp_path_factory.mktemp("grid") for _ in GRIDS]
    for grid, folder in zip(GRIDS, folders, strict=True):
        assert grid.save(folder, full_tensors()) == [None] * grid.num_ranks
    return [folder / "step-00000010" for folder in folders]


@pytest.mark.parametrize("source", range(len(GRIDS)))
def test_saved_on_any_grid_loaded_on_any_other(saved, source):
    assert verify(saved[source]) == []
    for name, tensor in full_tensors().items():
        assert torch.equal(read_full(saved[source], name), tensor)
    for grid in GRIDS:
        for rank in range(grid.num_ranks):
            _, own = grid.load(saved[source], full_tensors(), rank)
            assert own["rng"].item() == (rank if grid.num_ranks == GRIDS[source].num_ranks else 99)


def test_replicas_are_written_once(saved):
    for folder in saved:
        manifest = read_manifest(folder)
        for stored in manifest.tensors.values():
            assert sum(shard.box.volume for shard in stored.shards) == math.prod(stored.shape)
        for name, held in manifest.held_by().items():
            header = int.from_bytes((folder / name).read_bytes()[:8], "little")
            assert (folder / name).stat().st_size == 8 + header + sum(it.bytes_of(shard) for _, it, shard in held)


def test_a_rank_opens_only_the_files_it_needs(saved, tmp_path):
    folder = tmp_path / "step-00000010"
    shutil.copytree(saved[1], folder)
    for name in ("rank-00001.safetensors", "rank-00002.safetensors"):
        (folder / name).unlink()
    assert torch.equal(read_full(folder, "optimizer/scalar"), torch.tensor(4.0))
    with pytest.raises(ValueError, match=r"rank-00001\.safetensors is missing"):
        read_full(folder, "model/uneven")


def test_parts_that_do_not_tile_are_not_published(tmp_path):
    writers = [checkpointer(tmp_path, rank, 2) for rank in range(2)]
    for writer in writers:
        writer.save(1, plain({"twice": torch.ones(4)}), {}, {})
    for writer in writers:
        writer.wait()
    assert "2 shards of tensor 'twice' do not hold each element" in writers[0].failure
    assert os.listdir(tmp_path) == []


@st.composite
def cuts_of_a_model(draw):
    """How tensor ranks divide a model of any shape; key heads are held by several of them, or several by each."""
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    config = ModelConfig(
        dim=draw(st.integers(1, 9)),
        num_layers=1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 2)),
        ffn_dim=draw(st.integers(heads, 300)),
        vocab_size=draw(st.integers(1, 9)),
        tie_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
    )
    with torch.device("meta"):
        model: nn.Module = Transformer(config)
    return tensor_cuts(model, draw(st.integers(1, heads)))


@given(cuts=cuts_of_a_model(), plane=st.integers(1, 7), other=st.integers(1, 7))
@settings(max_examples=60)
def test_the_boxes_of_all_ranks_that_speak_tile_every_tensor(cuts, plane, other):
    for name, cut in cuts.items():
        boxes = [
            Box(*cut.shard(rank, index, plane))
            for rank in range(len(cut.parts))
            if cut.speaks(rank)
            for index in range(plane)
        ]
        assert tiles(cut.shape, boxes), name
        # What they read of another grid's shards is just as much.
        wanted = [Box(*Cut.whole(cut.shape).shard(0, index, other)) for index in range(other)]
        parts = [part for box in wanted for part in (one.intersection(box) for one in boxes) if part]
        assert tiles(cut.shape, parts), name


def test_what_is_read_is_what_is_wanted(saved):
    """By file: no byte twice, none that no box wants, and no file without one."""
    for folder in saved:
        manifest = read_manifest(folder)
        for grid in GRIDS:
            for rank in range(grid.num_ranks):
                wanted = {name: part.box for name, part in grid.parts(full_tensors(), rank).items()}
                found = reads(manifest, wanted)
                assert all(found.values())
                for name, box in wanted.items():
                    parts = [part for items in found.values() for n, _, part in items if n == name]
                    inside = [
                        Box(tuple(o - b for o, b in zip(p.offsets, box.offsets, strict=True)), p.sizes) for p in parts
                    ]
                    assert tiles(box.sizes, inside)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_state_on_a_gpu(tmp_path):
    tensors = {name: tensor.cuda() for name, tensor in full_tensors().items()}
    writer = checkpointer(tmp_path)
    for step in (1, 2):
        for tensor in tensors.values():
            tensor.add_(1)
        writer.save(step, plain(tensors), {"rng": torch.cuda.get_rng_state()}, {})
    writer.wait()
    assert writer.failure is None
    found = empty_like(tensors)
    load(tmp_path / "step-00000002", plain(found), {"rng": torch.zeros_like(torch.cuda.get_rng_state())}, 0, 1)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
