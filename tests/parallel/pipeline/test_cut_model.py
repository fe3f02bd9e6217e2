"""A model cut to a stage, what messages cost, and the backward pass in two parts, in one process."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_cases import Case, whole_model
from torch import nn

from armillary.parallel.pipeline.cut_model import cut_to_stage
from armillary.parallel.pipeline.later import pay
from armillary.parallel.pipeline.mail import bytes_sent
from armillary.parallel.pipeline.split_backward import split_backward
from armillary.parallel.schedule.actions import place_stages


def kept(tied: bool, layers: range, begins: bool, ends: bool) -> set[str]:
    model = whole_model(Case(tied=tied), 3)
    cut_to_stage(model, layers, begins, ends)
    assert (model.begins, model.ends) == (begins, ends)
    return {name.split(".attention")[0].split(".ffn")[0] for name, _ in model.named_parameters()}


def test_a_stage_keeps_its_own():
    assert kept(False, range(2), True, False) == {"embedding.weight", "blocks.0", "blocks.1"}
    assert kept(False, range(2, 3), False, False) == {"blocks.2"}
    assert kept(False, range(3, 4), False, True) == {"blocks.3", "norm.weight", "output.weight"}
    assert kept(True, range(3, 4), False, True) == {"blocks.3", "norm.weight", "embedding.weight"}
    assert kept(True, range(1, 3), False, False) == {"blocks.1", "blocks.2"}
    assert kept(True, range(0), False, True) == {"norm.weight", "embedding.weight"}
    assert "embedding.weight" in kept(True, range(4), True, True)


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"layers \[4, 5\]"):
        cut_to_stage(whole_model(Case(), 3), range(3, 6), False, True)


@given(
    ranks=st.integers(1, 4),
    per_rank=st.integers(1, 3),
    shape=st.sampled_from(["loop", "v"]),
    sizes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.just(5)), max_size=5),
)
@settings(max_examples=50, deadline=None)
def test_messages_cost_what_crosses_between_ranks(ranks, per_rank, shape, sizes):
    placed = place_stages(ranks, per_rank, shape)
    numbers = sum(rows * tokens * dim for rows, tokens, dim in sizes)
    crossings = sum(a != b for a, b in pairwise(placed))
    both = bytes_sent(placed, sizes, torch.float32)
    assert len(both) == ranks
    assert sum(both) == 2 * crossings * numbers * 4
    assert sum(bytes_sent(placed, sizes, torch.float32, backward=False)) == crossings * numbers * 4
    # What crosses forward comes back, so over both directions a rank sends what it receives.
    received = [0] * ranks
    for a, b in pairwise(placed):
        received[b] += (a != b) * numbers * 4
        received[a] += (a != b) * numbers * 4
    assert both == received


class Twice(nn.Module):
    """One layer used twice, one that is frozen, one without bias, on a tensor of any number of dims."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.frozen, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2, bias=False)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.last(self.frozen(self.shared(torch.tanh(self.shared(x)))))


@given(dims=st.lists(st.integers(0, 3), max_size=3), batches=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_in_two_parts_as_in_one(dims, batches):
    torch.manual_seed(0)
    model, inputs = Twice().double(), [torch.randn(*dims, 6, dtype=torch.float64) for _ in range(batches)]
    want = [x.clone().requires_grad_() for x in inputs]
    sum(model(x).square().sum() for x in want).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    later = split_backward(model)
    got = [x.clone().requires_grad_() for x in inputs]
    owed = []
    for x in got:
        later.owed = []
        model(x).square().sum().backward()
        owed.append(later.owed)
    later.owed = None
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.allclose(a.grad, b.grad, atol=1e-12) for a, b in zip(got, want, strict=True))
    for one in owed:
        pay(one)
        assert not one
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, gradients[name], atol=1e-12, rtol=0)
    assert model.frozen.weight.grad is None


def test_a_compiled_module_computes_all_at_once():
    model = nn.Sequential(nn.Linear(3, 3), torch.compile(nn.Linear(3, 3), backend="eager"))
    later = split_backward(model)
    later.owed = []
    model(torch.ones(2, 3, requires_grad=True)).sum().backward()
    assert len(later.owed) == 1
    assert model[0].weight.grad is None
    assert model[1].weight.grad is not None
