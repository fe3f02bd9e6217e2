"""`auto` follows the spec's ratios and thresholds, never prefers TokenRing where it cannot win, and says why."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.kernels.attention.mask import Mask
from armillary.parallel.context.choice import Link, Machine, Shape, choose, ring_seconds, token_ring_seconds

PORT, MESH = Link(45e9), Link(45e9, own_links=True)


def shape(ranks: int = 8, tokens: int = 8192, heads: int = 32, kv_heads: int = 32, **options: int) -> Shape:
    return Shape(ranks, tokens, heads, kv_heads, 128, **options)


@pytest.mark.parametrize(
    ("group", "forward_mesh", "forward_port", "backward_mesh", "backward_port"),
    [
        (1, 1.97, 0.99, 2.95, 1.98),
        (2, 0.98, 0.50, 1.48, 0.99),
        (4, 0.49, 0.25, 0.74, 0.49),
        (8, 0.25, 0.12, 0.37, 0.25),
    ],
)
def test_ratios_of_the_literature(group, forward_mesh, forward_port, backward_mesh, backward_port):
    """Ring over TokenRing, head_dim 128, dQ sent home in bfloat16."""
    one = shape(kv_heads=32 // group)
    ratios = []
    for backward in (False, True):
        ring = one.keys + one.sums * backward
        out, home = one.sizes.token_ring(one.heads, backward)
        ratios += [ring / max(out, home), ring / (out + home)]
    assert ratios == pytest.approx([forward_mesh, forward_port, backward_mesh, backward_port], abs=0.008)


@pytest.mark.parametrize(
    ("link", "kv_heads", "forward", "backward"),
    [
        (PORT, 32, "ring", "token_ring"),  # MHA: TokenRing's backward is its one win behind a port
        (PORT, 16, "ring", "ring"),
        (PORT, 8, "ring", "ring"),
        (PORT, 4, "ring", "ring"),
        (MESH, 32, "token_ring", "token_ring"),  # two steps' queries at once, over more links than a ring uses
        (MESH, 16, "bidirectional_ring", "token_ring"),
        (MESH, 8, "bidirectional_ring", "bidirectional_ring"),
        (MESH, 4, "bidirectional_ring", "bidirectional_ring"),
    ],
)
def test_among_rings_where_nothing_is_hidden(link, kv_heads, forward, backward):
    """Of the strategies that hold one chunk at a time and need no heads to share out."""
    for back, expected in ((False, forward), (True, backward)):
        seconds = choose(shape(kv_heads=kv_heads), Machine(link), back).seconds
        rings = {name: seconds[name] for name in ("ring", "bidirectional_ring", "token_ring")}
        assert next(name for name, time in rings.items() if time <= 1.01 * min(rings.values())) == expected, rings


@pytest.mark.parametrize(
    ("rate", "group", "threshold"), [(350e9, 1, 2286), (350e9, 8, 286), (45e9, 1, 17_778), (45e9, 8, 2222)]
)
def test_a_ring_hides_from_a_length_on(rate, group, threshold):
    """L >= 2 G F / (H b) at 400 TFLOP/s: the spec's figures."""
    for tokens, hidden in ((threshold - 2, False), (threshold + 2, True)):
        one = shape(tokens=tokens, kv_heads=32 // group)
        tile = one.tile(False, 400e12)
        assert (ring_seconds(one, Link(rate), False, tile) == pytest.approx(8 * tile, rel=1e-9)) is hidden


def test_where_all_is_hidden_the_plain_ring_is_taken():
    """Forward TokenRing loses even for MHA: its last results come home with nothing to hide them. Backward a ring's
    last sums do too, and the two are equal within a percent."""
    one, machine = shape(tokens=100_000, heads=33, kv_heads=33), Machine(PORT, flops=100e12)
    for backward in (False, True):
        choice = choose(one, machine, backward)
        assert choice.strategy == "ring"
        assert backward or choice.seconds["token_ring"] > choice.seconds["ring"]


@given(st.integers(2, 64), st.sampled_from([1, 2, 4, 8, 32]), st.booleans(), st.sampled_from([0.0, 1e-5]))
def test_behind_a_port_no_direction_helps_and_token_ring_loses_forward(ranks, kv_heads, backward, latency):
    seconds = choose(shape(ranks, kv_heads=kv_heads), Machine(Link(1e9, latency)), backward).seconds
    assert seconds["bidirectional_ring"] == seconds["ring"]
    if not backward:
        assert seconds["token_ring"] > seconds["ring"]


def test_two_directions_of_two_ranks_are_one_link():
    seconds = choose(shape(2), Machine(MESH), False).seconds
    assert seconds["bidirectional_ring"] == seconds["ring"]


def test_token_ring_counts_its_last_way_home():
    one = shape(4)
    out = 8192 * 32 * 128 * 2 / 45e9
    home = out + 8192 * 32 * 4 / 45e9
    # Three ways out and three home through one port; over links, steps 1 and 2 at once, then step 3.
    assert token_ring_seconds(one, PORT, False, 0.0) == pytest.approx(3 * out + 3 * home)
    assert token_ring_seconds(one, MESH, False, 0.0) == pytest.approx(2 * out + home)
    assert token_ring_seconds(shape(2), MESH, False, 0.0) == pytest.approx(out + home)


def test_room_and_windows_and_levels():
    mesh = choose(shape(), Machine(MESH), False)
    assert mesh.strategy in ("all_gather", "ulysses")
    tight = choose(shape(heads=9, kv_heads=3), Machine(MESH, room=1e6), False)
    assert tight.strategy != "all_gather"
    assert "all_gather is left out: it holds" in tight.why
    assert choose(shape(), Machine(PORT), False, mask=Mask(window=512)).strategy == "all_gather"
    assert "hybrid" not in choose(shape(), Machine(PORT), False, level=2).seconds
    slow_outside = Machine(Link(1e9), inside=Link(400e9))
    grouped = choose(shape(kv_heads=8), slow_outside, False, level=2)
    assert grouped.seconds["hybrid"] < grouped.seconds["ring"]


def test_levels_are_a_swap_inside_and_a_ring_of_longer_shards_with_fewer_heads_across():
    """Eight ranks in levels of two: 16 of 32 heads and 4 of 8 key heads each, then three steps of two ranks' tokens."""
    seconds = choose(shape(kv_heads=8), Machine(PORT, inside=Link(400e9)), False, level=2).seconds["hybrid"]
    keys = 2 * 4 * 128 * 2
    swap = 8192 * (16 * 128 * 2 + keys + 16 * (128 * 2 + 4))
    assert seconds == pytest.approx(swap / 400e9 + 3 * 2 * 8192 * keys / 45e9)


def test_one_rank_exchanges_nothing():
    for backward in (False, True):
        assert set(choose(shape(1), Machine(PORT), backward).seconds.values()) == {0.0}


def test_it_says_why():
    choice = choose(shape(kv_heads=8), Machine(Link(45e9, 1e-5), room=1e9), True)
    assert choice.why.startswith(f"backward: {choice.strategy}, of ring ")
    for part in (
        "8 ranks of 8192 tokens",
        "32 heads and 8 key heads of 128",
        "one port a rank, 45 GB/s, 10 µs latency",
    ):
        assert part in choice.why
