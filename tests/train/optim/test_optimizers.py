"""Parameter groups, named state that resumes exactly, and the gradient's norm; whole and sharded."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from armillary.comm.ledger import Ledger
from armillary.parallel.cut import Cut
from armillary.parallel.held import clean_name
from armillary.train.optim.muon import Spread
from armillary.train.optim.optimizers import clip_, gradient_norm, optimizers_of, split_parameters
from armillary.train.optim.schedule import OptimConfig

BLOCK = {"blocks.0.up.weight", "blocks.0.down.weight", "blocks.1.up.weight", "blocks.1.down.weight"}
VECTORS = {"norm.weight", "blocks.0.norm.weight", "blocks.0.up.bias", "blocks.1.norm.weight", "blocks.1.up.bias"}


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(dim), nn.Linear(dim, 7), nn.Linear(7, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Tiny(nn.Module):
    """An odd-sized language model: on 4 ranks some shards are uneven and some are empty."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 5)
        self.blocks = nn.ModuleList([Block(5), Block(5)])
        self.norm = nn.RMSNorm(5)
        self.output = nn.Linear(5, 11, bias=False)
        if tied:
            self.output.weight = self.embedding.weight
        self.to(torch.float64)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.output(self.norm(x))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def tokens(step: int) -> Tensor:
    return torch.randint(11, (12, 6), generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizers: Any, steps: range, rows: slice, group: Any = None) -> list[float]:
    """Steps with clipping on some rows of each batch; the gradient norms."""
    norms, ledger = [], Ledger()
    parameters = list(model.parameters())
    for step in steps:
        (model(tokens(step)[rows]) / 60).backward()
        norm = gradient_norm(parameters, group=group, ledger=ledger)
        clip_(parameters, norm, 0.5)
        optimizers.step(1 / (1 + step))
        optimizers.zero_grad()
        norms.append(norm.item())
    assert ledger.entries["gradient norm", "all_reduce"].calls == (len(steps) if group else 0)
    return norms


def config(kind: str) -> OptimConfig:
    return OptimConfig(kind=kind, learning_rate=0.01, muon_learning_rate=0.05)  # type: ignore[arg-type]


def as_arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {k: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone().numpy() for k, t in tensors.items()}


@pytest.mark.parametrize("tied", [False, True])
def test_matrices_decay_and_vectors_and_embeddings_do_not(tied: bool) -> None:
    hidden, outer, plain = split_parameters(named(Tiny(tied)))
    assert set(hidden) == BLOCK
    assert set(outer) == (set() if tied else {"output.weight"})
    assert set(plain) == VECTORS | {"embedding.weight"}


@pytest.mark.parametrize(("kind", "tied"), [("adamw", False), ("adamw", True), ("muon", False), ("muon", True)])
def test_each_parameter_has_one_optimizer_and_its_decay(kind: str, tied: bool) -> None:
    optimizers = optimizers_of(named(Tiny(tied)), config(kind))
    found = {
        optimizers.names[p]: (type(o).__name__, g["weight_decay"], g["initial_lr"])
        for o in optimizers.optimizers
        for g in o.param_groups
        for p in g["params"]
    }
    inside = ("Muon", 0.1, 0.05) if kind == "muon" else ("AdamW", 0.1, 0.01)
    expected = dict.fromkeys(BLOCK, inside) | dict.fromkeys(VECTORS | {"embedding.weight"}, ("AdamW", 0.0, 0.01))
    assert found == expected | ({} if tied else {"output.weight": ("AdamW", 0.1, 0.01)})


def test_frozen_parameters_are_left_out() -> None:
    model = Tiny()
    model.embedding.requires_grad_(False)
    assert "embedding.weight" not in optimizers_of(named(model), config("adamw")).names.values()


def test_adamw_steps_as_torch_does() -> None:
    model, twin = Tiny(), Tiny()
    optimizers = optimizers_of(named(model), config("adamw"))
    decays = [p for n, p in twin.named_parameters() if n in BLOCK or n == "output.weight"]
    others = [p for n, p in twin.named_parameters() if not (n in BLOCK or n == "output.weight")]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    train(model, optimizers, range(4), slice(None))
    for step in range(4):
        (twin(tokens(step)) / 60).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        for group in reference.param_groups:
            group["lr"] = 0.01 / (1 + step)
        reference.step()
        reference.zero_grad()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_created_state_is_what_a_first_step_creates(kind: str, dtype: torch.dtype) -> None:
    model, stepped = Tiny().to(dtype), Tiny().to(dtype)
    before = as_arrays(dict(model.named_parameters()))
    fresh, used = optimizers_of(named(model), config(kind)), optimizers_of(named(stepped), config(kind))
    assert fresh.state_tensors() == {}
    fresh.create_state()
    train(stepped, used, range(1), slice(None))
    assert all(np.array_equal(before[n], p.detach()) and p.grad is None for n, p in model.named_parameters())
    created, made = fresh.state_tensors(), used.state_tensors()
    assert {n: (t.shape, t.dtype, t.device) for n, t in created.items()} == {
        n: (t.shape, t.dtype, t.device) for n, t in made.items()
    }
    assert all(not t.any() for t in created.values())
    assert created["optimizer/step/norm.weight"].shape == ()
    moment = "momentum_buffer" if kind == "muon" else "exp_avg"
    assert f"optimizer/{moment}/blocks.0.up.weight" in created
    used.create_state()
    assert all(t is made[n] for n, t in used.state_tensors().items())
    # The first step from created state is the first step from none.
    train(model, fresh, range(1), slice(None))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), stepped.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(kind: str) -> None:
    unbroken = Tiny().float()
    optimizers = optimizers_of(named(unbroken), config(kind))
    train(unbroken, optimizers, range(3), slice(None))
    saved = as_arrays(dict(unbroken.named_parameters()) | optimizers.state_tensors())
    train(unbroken, optimizers, range(3, 6), slice(None))

    resumed = Tiny().float()
    optimizers = optimizers_of(named(resumed), config(kind))
    optimizers.create_state()
    with torch.no_grad():
        for name, tensor in (dict(resumed.named_parameters()) | optimizers.state_tensors()).items():
            tensor.copy_(torch.from_numpy(saved[name]))
    train(resumed, optimizers, range(3, 6), slice(None))
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True))


Trained = tuple[list[float], dict[str, np.ndarray]]


def train_sharded(rank: int) -> tuple[list[Trained], float]:
    """With FSDP2, each rank on its rows of the batch: norms, parameters and state of each kind of optimizer; and the
    norm of what is partly sharded."""
    num_ranks = dist.get_world_size()
    mesh, results = init_device_mesh("cpu", (num_ranks,)), []
    for kind in ("adamw", "muon"):
        model = Tiny()
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        spreads = {p: Spread.of(Cut.whole(tuple(p.shape)), num_ranks) for p in model.parameters() if p.ndim == 2}
        facts = {"group": mesh.get_group(), "ledger": Ledger(), "spreads": spreads}
        optimizers = optimizers_of(named(model), config(kind), **facts)
        optimizers.create_state()
        share = 12 // num_ranks
        norms = train(model, optimizers, range(4), slice(rank * share, (rank + 1) * share), mesh.get_group())
        tensors = dict(model.named_parameters()) | optimizers.state_tensors()
        assert all(isinstance(t, DTensor) for n, t in tensors.items() if not n.startswith("optimizer/step/"))
        results.append((norms, as_arrays(tensors)))
    return results, norm_of_a_mixture(rank)


@pytest.fixture(scope="module")
def on_four(world: Callable[..., list[Any]]) -> list[tuple[list[Trained], float]]:
    """Enough ranks for shards that are uneven and some that are empty."""
    return world(train_sharded, 4)


def test_sharded_training_equals_one_process(on_four: list[tuple[list[Trained], float]]) -> None:
    results = [trained for trained, _ in on_four]
    for case, kind in enumerate(("adamw", "muon")):
        model = Tiny()
        optimizers = optimizers_of(named(model), config(kind))
        norms = train(model, optimizers, range(4), slice(None))
        expected = as_arrays(dict(model.named_parameters()) | optimizers.state_tensors())
        for rank in range(4):
            assert results[rank][case][0] == pytest.approx(norms, rel=1e-12)
            assert results[rank][case][0] == results[0][case][0]
            assert results[rank][case][1].keys() == expected.keys()
            for name, value in expected.items():
                np.testing.assert_allclose(results[rank][case][1][name], value, rtol=1e-11, atol=1e-13, err_msg=name)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=6), st.booleans())
def test_the_norm_is_torchs(shapes: list[list[int]], double: bool) -> None:
    generator, dtype = torch.Generator().manual_seed(len(shapes)), torch.float64 if double else torch.float32
    parameters = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, dtype=dtype, generator=generator)
    norm = gradient_norm([*parameters, torch.zeros(3)], group=None, ledger=Ledger())
    assert norm.dtype == dtype
    exact = torch.cat([p.grad.double().flatten() for p in parameters if p.grad is not None]).norm().item()
    assert norm.item() == pytest.approx(exact, rel=1e-14 if double else 1e-6)


def test_the_norm_of_a_long_float32_gradient_is_exact() -> None:
    parameter = torch.zeros(2048, 2048)
    parameter.grad = torch.full_like(parameter, 0.1)
    norm = gradient_norm([parameter], group=None, ledger=Ledger()).item()
    assert norm == pytest.approx(204.8, rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_element_makes_the_norm_bad(value: float) -> None:
    parameter = torch.zeros(5, 3)
    parameter.grad = torch.ones(5, 3)
    parameter.grad[4, 1] = value
    assert not gradient_norm([parameter], group=None, ledger=Ledger()).isfinite()


@settings(deadline=None)
@given(st.floats(0, 10), st.floats(0.01, 10))
def test_clipping_is_torchs(length: float, limit: float) -> None:
    ours, theirs = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    ours.grad, theirs.grad = (torch.tensor([length, 0.0, -length], dtype=torch.float64) for _ in range(2))
    norm = nn.utils.clip_grad_norm_([theirs], limit)
    clip_([ours, torch.zeros(2)], norm, limit)
    assert torch.equal(ours.grad, theirs.grad)


def test_a_limit_of_zero_does_not_clip() -> None:
    parameter = torch.zeros(2)
    parameter.grad = torch.full((2,), 50.0)
    clip_([parameter], torch.tensor(70.7), 0.0)
    assert parameter.grad.tolist() == [50.0, 50.0]


def norm_of_a_mixture(rank: int) -> float:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = distribute_tensor(torch.zeros(3, 2), mesh, [Shard(0)])
    sharded.grad = distribute_tensor(torch.full((3, 2), 2.0), mesh, [Shard(0)])
    whole = torch.zeros(4)
    whole.grad = torch.full((4,), 3.0)
    counted = [sharded, whole] if rank == 0 else [sharded]
    return gradient_norm(counted, group=mesh.get_group(), ledger=Ledger()).item()


def test_what_all_ranks_hold_is_counted_by_one(on_four: list[tuple[list[Trained], float]]) -> None:
    assert [norm for _, norm in on_four] == pytest.approx([(6 * 4 + 4 * 9) ** 0.5] * 4)


def test_names_lose_their_wrappers() -> None:
    assert clean_name("_orig_mod.blocks.0._checkpoint_wrapped_module.up.weight") == "blocks.0.up.weight"
