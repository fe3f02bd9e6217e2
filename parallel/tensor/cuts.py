"""Which part of each parameter a tensor rank holds: pure functions of the model's shape.

Query heads, and with them the output projection's columns, follow the key heads: a rank holds whole groups of query
heads that share a key head, or a part of one group, never parts of two. So its own heads are again a grouped-query
attention whose groups lie in order. Nothing needs to divide; a part of the vocabulary may be empty.
"""

import itertools
from typing import Any

from torch import nn

from armillary.parallel.cut import Cut

Part = tuple[int, int]
"""First element and size."""


def tensor_cuts(model: nn.Module, degree: int) -> dict[str, Cut]:
    """How `degree` tensor ranks divide each parameter of a whole model, by its name.

    Args:
        model: a `train.model.transformer.Transformer` that no plan has changed yet; on the meta device if need be.

    Raises:
        ValueError: if there are more ranks than query heads, or than channels of the feed-forward.
    """
    config: Any = model.config
    num_heads, kv_heads, head_dim = config.num_heads, config.kv_heads, config.head_size
    if degree > num_heads:
        raise ValueError(
            f"plan.tp = {degree}: tensor ranks share out query heads, and model.num_heads = {num_heads}; "
            f"set plan.tp to {num_heads} or less"
        )
    if degree > config.hidden:
        raise ValueError(
            f"plan.tp = {degree}: tensor ranks share out the feed-forward's channels, and model.ffn_dim = "
            f"{config.hidden}; set plan.tp to {config.hidden} or less"
        )
    queries, keys = (
        [(a * head_dim, n * head_dim) for a, n in parts] for parts in head_parts(num_heads, kv_heads, degree)
    )
    cuts = {}
    for name, parameter in model.named_parameters():
        shape, layer = tuple(parameter.shape), name.rsplit(".", 2)[-2]
        if name in ("embedding.weight", "output.weight"):
            cuts[name] = Cut.even(shape, 0, degree)
        elif layer in ("gate", "up"):
            cuts[name] = Cut.even(shape, 0, degree, _unit(shape[0], degree))
        elif layer == "down":
            cuts[name] = Cut.even(shape, 1, degree, _unit(shape[1], degree))
        elif layer == "query":
            cuts[name] = Cut(shape, 0, tuple(queries))
        elif layer in ("key", "value"):
            cuts[name] = Cut(shape, 0, tuple(keys))
        elif layer == "output":
            cuts[name] = Cut(shape, 1, tuple(queries))
        else:
            assert layer.endswith("norm"), f"no rule says how tensor ranks divide {name}"
            cuts[name] = Cut.whole(shape, degree)
    return cuts


def head_parts(num_heads: int, kv_heads: int, degree: int) -> tuple[list[Part], list[Part]]:
    """Query heads and key heads of each of `degree` ranks, at most `num_heads`.

    With no more ranks than key heads these are shared out, else each key head has several ranks, neighbours, which
    share out its query heads.
    """
    ratio = num_heads // kv_heads
    if degree <= kv_heads:
        keys = _even(kv_heads, degree)
        return [(first * ratio, count * ratio) for first, count in keys], keys
    queries, keys = [], []
    for head, (_, sharers) in enumerate(_even(degree, kv_heads)):
        queries += [(head * ratio + first, count) for first, count in _even(ratio, sharers)]
        keys += [(head, 1)] * sharers
    return queries, keys


def _unit(channels: int, degree: int) -> int:
    """Channels that stay together: a GPU multiplies fastest rows of whole 16 bytes, eight bfloat16 numbers; where that
    makes no rank's part larger by more than a sixteenth."""
    return 8 if channels % 8 == 0 and channels >= 16 * 8 * degree else 1


def _even(total: int, parts: int) -> list[Part]:
    """Neighbouring parts whose sizes differ by one at most."""
    edges = [total * part // parts for part in range(parts + 1)]
    return [(a, b - a) for a, b in itertools.pairwise(edges)]


def first_kv_head(cuts: dict[str, Cut], rank: int, head_dim: int) -> int:
    """Number, in the whole model, of the first key head that a tensor rank holds."""
    cut = next(cut for name, cut in cuts.items() if name.endswith(".attention.key.weight"))
    return cut.parts[rank][0] // head_dim


def hidden_shape(grid: tuple[int, int], dim: int, degree: int) -> tuple[int, ...]:
    """Shape of the residual stream on each tensor rank: (batch, seq, dim) on one, else (rows, dim), where the tokens of
    all rows of the batch, one after the other, are shared out and the last ranks filled up with rows of zeros."""
    return (*grid, dim) if degree == 1 else (-(-grid[0] * grid[1] // degree), dim)
