"""The closed rule of what a query sees, against the same rule in plain Python, and what contradicts itself."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tile_cases import masks, sees

from armillary.kernels.attention.mask import Mask, visible


@settings(max_examples=200, deadline=None)
@given(masks(), st.lists(st.integers(0, 40), max_size=8), st.lists(st.integers(0, 40), max_size=8), st.integers(0, 5))
def test_is_the_rule_in_plain_python(mask: Mask, queries: list[int], keys: list[int], head: int) -> None:
    i, j = torch.tensor(queries, dtype=torch.int64), torch.tensor(keys, dtype=torch.int64)
    got = visible(mask, i[:, None], j[None, :], head)
    assert got.dtype == torch.bool
    assert got.tolist() == [[sees(mask, one, other, head) for other in keys] for one in queries]


@settings(max_examples=50, deadline=None)
@given(masks(), st.integers(1, 6))
def test_heads_broadcast_too(mask: Mask, heads: int) -> None:
    at = torch.arange(20)
    together = visible(mask, at[:, None], at, torch.arange(heads)[:, None, None])
    # Without strided blocks all heads see the same, and the rule has no dim for them.
    assert together.shape == ((heads, 20, 20) if mask.stride else (20, 20))
    for head in range(heads):
        assert torch.equal(together.expand(heads, 20, 20)[head], visible(mask, at[:, None], at, head))


def test_pictures() -> None:
    at = torch.arange(8)

    def picture(mask: Mask, head: int = 0) -> list[str]:
        return ["".join(".x"[seen] for seen in line) for line in visible(mask, at[:, None], at, head).int().tolist()]

    assert picture(Mask(window=2, sinks=1)) == [
        "x.......", "xx......", "xxx.....", "x.xx....", "x..xx...", "x...xx..", "x....xx.", "x.....xx"
    ]  # fmt: skip
    blocked = ["xxxx....", "xxxx....", "xxxxxx..", "xxxxxx..", "..xxxxxx", "..xxxxxx", "....xxxx", "....xxxx"]
    assert picture(Mask(causal=False, window=4, block=2)) == blocked
    strided = Mask(window=2, block=2, stride=2, shift=1)
    assert picture(strided)[6:] == ["xx..xxx.", "xx..xxxx"]
    assert picture(strided, head=1)[6:] == ["..xx..x.", "..xx..xx"]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"window": -1}, "window is negative"),
        ({"window": 4, "sinks": -1}, "sinks is negative"),
        ({"window": 4, "stride": -2}, "stride is negative"),
        ({"window": 4, "shift": -2}, "shift is negative"),
        ({"window": 4, "block": 0}, "block is negative or zero"),
        ({"window": 6, "block": 4}, "window 6 and sinks 0 must be multiples of block 4"),
        ({"window": 8, "sinks": 2, "block": 4}, "window 8 and sinks 2 must be multiples of block 4"),
        ({"sinks": 4}, "set window and causal"),
        ({"stride": 4}, "set window and causal"),
        ({"window": 4, "sinks": 4, "causal": False}, "set window and causal"),
        ({"window": 4, "stride": 4, "causal": False}, "set window and causal"),
        ({"block": 64}, "set window, or leave block at 1"),
    ],
)
def test_what_contradicts_itself_is_refused(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^mask: .*{message}"):
        Mask(**numbers)


def test_equal_masks_are_one_key() -> None:
    assert len({Mask(), Mask(True, 0), Mask(window=4), Mask(window=4, block=2)}) == 3
    assert Mask(window=8, block=2).reach == 4
