"""Bytes that tensor parallelism makes one rank send: formulas, which tests hold against the ledger.

With T ranks and rows of their tokens, a move (a gather or a scatter of hidden) is (T - 1) rows x dim elements:

    moves               forward    computed again      backward
    a block             4          full 3, selective 1 4
    embedding, head     1 each                         1 each
"""

import math

import torch

from armillary.kernels.cross_entropy import chunk_rows
from armillary.parallel.cut import Cut
from armillary.parallel.tensor.cuts import hidden_shape

AGAIN = {"none": 0, "selective": 1, "full": 3}
"""Moves that a block computes again for backward: the last way out is not, since nothing of it is kept."""


def tensor_bytes(
    grid: tuple[int, int],
    dim: int,
    degree: int,
    num_blocks: int,
    dtype: torch.dtype,
    *,
    vocabulary: Cut | None = None,
    begins: bool = True,
    recompute: str = "none",
    backward: bool = True,
    device: str = "cpu",
) -> int:
    """Bytes of activations that each tensor rank sends in one forward pass with labels, and in its backward pass.

    Args:
        grid: rows and tokens a row.
        num_blocks: of this stage.
        dtype: of hidden.
        vocabulary: of the output matrix, on the stage that ends.
        begins: whether the stage has the embedding.
        recompute: of every block.
        device: on which the loss is computed; it says in how many chunks.
    """
    if degree == 1:
        return 0
    rows, _ = hidden_shape(grid, dim, degree)
    ends = vocabulary is not None
    moves = 4 * num_blocks + begins + ends
    if backward:
        moves = 2 * moves + AGAIN[recompute] * num_blocks
    loss = _loss_bytes(grid[0] * grid[1], vocabulary, dtype, device) if vocabulary else 0
    return moves * (degree - 1) * rows * dim * dtype.itemsize + loss


def _loss_bytes(tokens: int, vocabulary: Cut, dtype: torch.dtype, device: str) -> int:
    """Of each chunk one number a token is reduced, then three, in the dtype of the softmax."""
    chunk = chunk_rows(device, max(size for _, size in vocabulary.parts))
    degree, width = len(vocabulary.parts), 8 if dtype == torch.float64 else 4
    sizes = [min(chunk, tokens - first) for first in range(0, tokens, chunk)]
    return sum(2 * (degree - 1) * numbers * size * width // degree for size in sizes for numbers in (1, 3))


def replica_bytes(cuts: dict[str, Cut], rank: int, dtype: torch.dtype) -> int:
    """Bytes that a tensor rank sends to sum the gradients, all of one dtype, of what it holds like others."""
    degree = len(next(iter(cuts.values())).parts)
    elements: dict[tuple[int, ...], int] = {}
    for cut in cuts.values():
        holders = cut.holders(rank)
        elements[holders] = elements.get(holders, 0) + math.prod(cut.local_shape(rank))
    sent = 0
    for holders, number in elements.items():
        if len(holders) == degree:
            sent += 2 * (degree - 1) * (number * dtype.itemsize) // degree
        else:
            sent += (len(holders) - 1) * number * dtype.itemsize
    return sent
