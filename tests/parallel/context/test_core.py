"""Every strategy gives what one process gives, to the last digits of float64, and moves the bytes it should."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from context_cases import Case, covering, poison_receives, run_alone, run_on_rank

from armillary.comm import exchange
from armillary.comm.ledger import Ledger
from armillary.kernels.attention import call as attention
from armillary.kernels.attention.mask import Mask
from armillary.kernels.attention.places import Places
from armillary.parallel.context.bytes import bytes_sent
from armillary.parallel.context.core import STRATEGIES, ContextCore, context_attention, smallest_divisor
from armillary.parallel.context.layout import lay_out

NAMES = ("out", "lse", "dQ", "dK", "dV")


def exactness(rank: int, num_ranks: int, seed: int) -> list[str]:
    """What went wrong in any of the cases."""
    poison_receives()
    wrong = []
    # That passes of unlike strategies fit together does not depend on how many ranks there are.
    for number, case in enumerate(covering(seed, mixed=num_ranks < 5)):
        layout, ledger = case.layout(num_ranks), Ledger()
        whole = case.tensors(layout, torch.float64)
        results = run_on_rank(case, layout, whole, ledger)
        for name, got, want in zip(NAMES, results, run_alone(case, layout, whole, torch.float64), strict=True):
            error = (got - layout.take(want, rank)).abs().max() if got.numel() else torch.zeros(())
            if not error < 1e-10:
                wrong.append(f"{name} is off by {error:.1e}: {case}")
        wrong += [f"{problem}: {case}" for problem in wrong_bytes(case, layout.shards(), ledger, rank)]
        if number % 4 == 0:
            again = run_on_rank(case, layout, whole, Ledger())
            wrong += [f"not repeatable: {case}"] * (not all(map(torch.equal, results, again)))
    return wrong


def wrong_bytes(case: Case, shards: tuple[Places, ...], ledger: Ledger, rank: int) -> list[str]:
    (heads, kv_heads), problems = case.heads, []
    for backward, purpose in enumerate(("context forward", "context backward")):
        want = bytes_sent(
            case.strategy[backward],
            bool(backward),
            shards,
            case.mask,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=case.head_dim,
            dtype=torch.float64,
            level=smallest_divisor(len(shards)),
        )[rank]
        if ledger.bytes(purpose) != want:
            problems.append(f"{purpose}: {ledger.bytes(purpose)} bytes, not {want}")
    return problems


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 8])
def test_exact_on_any_number_of_ranks(world, num_ranks):
    wrong = [problem for found in world(exactness, num_ranks, num_ranks, num_ranks) for problem in found]
    assert not wrong, "\n".join(wrong[:10])


BF16 = Case(("ring", "ring"), "striped", Mask(), (4, 2), 203, "one", head_dim=16)


def bf16_errors(rank: int, num_ranks: int) -> list[tuple[str, str, float, float]]:
    """Strategy, result, squared error of this rank's share and of the same share of one rank in bf16."""
    poison_receives()
    found = []
    for number, name in enumerate(STRATEGIES):
        case = replace(BF16, strategy=(name, name), heads=((4, 2), (4, 4))[number % 2])
        layout = case.layout(num_ranks)
        whole = case.tensors(layout, torch.bfloat16)
        truth = run_alone(case, layout, whole, torch.float64)
        alone = run_alone(case, layout, whole, torch.bfloat16)
        for result, got, want, one in zip(NAMES, run_on_rank(case, layout, whole, Ledger()), truth, alone, strict=True):
            want, one = (layout.take(tensor, rank).double() for tensor in (want, one))
            found.append((name, result, float((got - want).square().sum()), float((one - want).square().sum())))
    return found


@pytest.mark.parametrize("num_ranks", [2, 8])
def test_bf16_is_as_good_as_on_one_rank(world, num_ranks):
    """The error of one rank, whatever the number of ranks: sums are float32 until the end. TokenRing rounds what goes
    home once more; lse is float32 everywhere, where the order of sums shows."""
    for entries in zip(*world(bf16_errors, num_ranks, num_ranks), strict=True):
        name, result = entries[0][:2]
        ours, alone = (sum(entry[column] for entry in entries) ** 0.5 for column in (2, 3))
        assert ours <= (1.5 if name == "token_ring" or result == "lse" else 1.05) * alone, (name, result, ours / alone)


def order_of_events(rank: int, strategy: str, causal: bool, backward: bool = False) -> list[str]:
    events: list[str] = []
    start, wait, tiles = exchange.start, exchange.Exchange.wait, (attention.forward, attention.backward)

    def noted(name, function, among=lambda *_, **__: True):
        def call(*args, **options):
            if among(*args):
                events.append(name)
            return function(*args, **options)

        return call

    exchange.start = noted("start", start, lambda sends, receives: bool(sends or receives))
    exchange.Exchange.wait = noted("wait", wait, lambda flight: bool(flight._works))
    attention.forward, attention.backward = (noted("tile", tile) for tile in tiles)
    layout = lay_out(torch.arange(12).view(1, 12).numpy(), None, 3, "contiguous")
    q = torch.randn(1, 4, 2, 4, requires_grad=True)
    mask = Mask(causal=causal)
    result = context_attention(q, q, q, layout.shards(), mask, strategy, group=dist.group.WORLD, ledger=Ledger())
    if backward:
        events.clear()
        result.out.sum().backward()
    return events


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("ring", "start tile wait start tile wait tile"),
        ("token_ring", "start start tile wait tile start wait tile start wait wait"),
        ("all_gather", "start start tile wait tile wait tile"),
    ],
)
def test_transfers_run_while_a_tile_is_computed(world, strategy, expected):
    for events in world(order_of_events, 3, strategy, False):
        assert events == expected.split()


@pytest.mark.parametrize("strategy", ["ring", "bidirectional_ring", "token_ring", "all_gather"])
def test_the_first_keys_come_and_the_last_gradients_go_home_while_a_tile_is_computed(world, strategy):
    for events in world(order_of_events, 3, strategy, False, True):
        assert "tile" in events[: events.index("wait")]
        last_start = len(events) - events[::-1].index("start")
        assert "tile" in events[last_start:]
        assert events[-1] == "wait"


@pytest.mark.parametrize("strategy", ["ring", "token_ring", "all_gather"])
def test_tiles_that_a_mask_makes_empty_are_skipped(world, strategy):
    """Contiguous and causal: rank r's queries see the keys of r + 1 ranks. TokenRing computes where the keys are."""
    tiles = [events.count("tile") for events in world(order_of_events, 3, strategy, True)]
    assert tiles == ([3, 2, 1] if strategy == "token_ring" else [1, 2, 3])


def refusals(rank: int) -> list[str]:
    layout = lay_out(torch.arange(6).view(1, 6).numpy(), None, 2, "contiguous")
    q = torch.randn(1, 3, 4, 2)
    facts = {"group": dist.group.WORLD, "ledger": Ledger()}
    found = []
    for shards, tensor, strategy, options in (
        (layout.shards()[:1], q, "ring", {}),
        (layout.shards(), q[:, :2], "ring", {}),
        (layout.shards(), q, "spiral", {}),
        (layout.shards(), q, "hybrid", {"level": 3}),
    ):
        with pytest.raises(ValueError) as caught:
            context_attention(tensor, tensor, tensor, shards, Mask(), strategy, **facts, **options)
        found.append(str(caught.value))
    return found


def test_what_does_not_fit_is_refused(world):
    expected = [
        "places of 1 shards, but the group has 2 ranks",
        "(1, 2) (batch, queries), but places for (1, 3)",
        "no strategy 'spiral' here; there are ring, bidirectional_ring",
        "levels of 3 ranks do not divide the 2 ranks of a context group; choose a divisor of 2",
    ]
    for messages in world(refusals, 2):
        assert all(part in message for part, message in zip(expected, messages, strict=True)), messages


def module(rank: int) -> list[bool]:
    """Two groups of three ranks, whose numbers in the group are not those in the world."""
    group = [dist.new_group(ranks) for ranks in ([0, 2, 4], [1, 3, 5])][rank % 2]
    place, found = group.rank(), []
    generator = torch.Generator().manual_seed(rank % 2)
    layout = lay_out(torch.arange(7).view(1, 7).numpy(), None, 3, "zigzag")
    q, k, v = torch.randn(3, 1, 7, 4, 2, generator=generator, dtype=torch.float64)
    q.requires_grad_()
    truth = attention.attention(q, k, v).out
    (gradient,) = torch.autograd.grad(truth.sum(), q, retain_graph=True)
    for name in STRATEGIES:
        core = ContextCore((name, "token_ring"), group=group, ledger=Ledger())
        mine = [layout.take(tensor, place) for tensor in (q, k, v)]
        got = core(*mine, layout.places(place))
        (d_q,) = torch.autograd.grad(got.sum(), mine[0])
        pairs = (got, layout.take(truth, place)), (d_q, layout.take(gradient, place))
        found += [torch.allclose(one, other, atol=1e-12) for one, other in pairs]
    return found


def test_a_module_in_the_place_of_the_models_own(world):
    for found in world(module, 6):
        assert found == [True] * 2 * len(STRATEGIES)
