"""Logits of a chunk of tokens -> their losses; the logits become their own gradient. Plain torch, any device."""

import torch
from torch import Tensor

from armillary.kernels.vocab_shard import VocabShard

IGNORE = -100
"""Label of a token that is not predicted."""

BLOCK_LOGITS = {"cpu": 2**19, "cuda": 2**26}
"""How many logits are widened at once: on the CPU what stays in its caches between the steps of the softmax."""


def softmax_rows(logits: Tensor, labels: Tensor, shard: VocabShard | None, z_loss: float) -> Tensor:
    """Losses (rows,) of logits (rows, vocab) for labels (rows,), and in the logits' place the losses' gradient.

    With lse = logsumexp of the row, the loss is lse - logits[label] + z_loss lse^2. Arithmetic and losses are float32,
    float64 for float64 logits. Rows of IGNORE, whose logits must be finite, get loss 0 and gradient 0. A label that is
    not in the vocabulary gives NaN.
    """
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    # Ranks reduce once for all rows, which are then widened together.
    fitting = BLOCK_LOGITS.get(logits.device.type, 2**19) // max(1, logits.shape[1])
    size = max(1, len(logits) if shard else fitting)
    room = None if logits.dtype == wide else torch.empty_like(logits[:size], dtype=wide)
    losses = torch.empty(len(logits), dtype=wide, device=logits.device)
    for loss, part, label in zip(losses.split(size), logits.split(size), labels.split(size), strict=True):
        exps = part if room is None else room[: len(part)].copy_(part)
        _block(loss, exps, label, shard, z_loss)
        if room is not None:
            part.copy_(exps)
    return losses


def _block(losses: Tensor, work: Tensor, labels: Tensor, shard: VocabShard | None, z_loss: float) -> None:
    """Fills `losses`; `work` (rows, vocab) holds logits and then their gradient, all in one wide dtype."""
    held, local = find_labels(labels, work.shape[1], shard)
    if work.shape[1]:
        largest = work.amax(dim=1)
    else:
        largest = torch.full_like(losses, -torch.inf)
    largest = shard.reduce_max(largest) if shard else largest
    work.sub_(largest[:, None])
    # The target's logit less the largest, not both: large logits then lose no digits of the loss.
    target = pick(work, local).masked_fill_(~held, 0)
    work.exp_()
    loss, scale = finish(torch.stack((work.sum(dim=1), target, held.to(work.dtype))), largest, labels, shard, z_loss)
    losses.copy_(loss)
    work.mul_(scale[:, None])
    if work.shape[1]:
        work.scatter_(1, local[:, None], (pick(work, local) - held.to(work.dtype))[:, None])


def find_labels(labels: Tensor, vocab: int, shard: VocabShard | None) -> tuple[Tensor, Tensor]:
    """Whether each label is one of this matrix's rows, and which one; any valid row where it is not."""
    local = labels - (shard.first if shard else 0)
    held = (labels != IGNORE) & (local >= 0) & (local < vocab)
    return held, local.masked_fill(~held, 0)


def pick(matrix: Tensor, columns: Tensor) -> Tensor:
    """`matrix[row, columns[row]]` of every row; zeros of a matrix without columns."""
    if not matrix.shape[1]:
        return matrix.new_zeros(len(matrix))
    return matrix.gather(1, columns[:, None]).squeeze(1)


def finish(
    sums: Tensor, largest: Tensor, labels: Tensor, shard: VocabShard | None, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Losses of all rows, and the factor that makes exp(logits - largest) the softmax's share of the gradient.

    sums (3, rows): of exp(logits - largest), of the target's logit less largest, and of how many ranks hold the target;
    this rank's, which are reduced here in one call.
    """
    total, target, holders = shard.reduce_sum(sums) if shard else sums
    ignored = labels == IGNORE
    loss, scale = total.log() - target, total.reciprocal()
    if z_loss:
        lse = largest + total.log()
        loss, scale = loss + z_loss * lse.square(), scale * (1 + 2 * z_loss * lse)
    loss = loss.masked_fill(holders != 1, torch.nan).masked_fill_(ignored, 0)
    return loss, scale.masked_fill(ignored, 0)
