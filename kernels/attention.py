"""Causal attention inside documents.

Shapes: q (batch, seq, heads, head_dim); k, v (batch, seq, kv_heads, head_dim), where kv_heads divides heads and each
key head serves `heads / kv_heads` query heads in a row; positions, documents (batch, seq).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class Places:
    """Where the tokens of one forward pass stand, and what follows from that alone, made once for all layers.

    Query i sees key j when both are in one row, their documents are equal and `positions[j] <= positions[i]`; any
    order of the tokens is allowed. `documents` and `positions` (batch, seq) are integers. `ordered` says that every
    row is one document whose positions count from 0: then no mask is needed.

    A plain class, which FSDP hands to a block as it is, mask and all.
    """

    def __init__(self, positions: Tensor, documents: Tensor, ordered: bool = False) -> None:
        self.positions, self.documents, self.ordered = positions, documents, ordered
        self._bias: Tensor | None = None

    @classmethod
    def of(cls, tokens: Tensor, positions: Tensor | None, documents: Tensor | None) -> "Places":
        """The places of `tokens` (batch, seq); None stands for one document in order in every row.

        Looks into the tensors only on the CPU, where that waits for no device. On a GPU, callers that know a batch to
        be whole documents in order pass None, and so save the mask.
        """
        count = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        if positions is None and documents is None:
            return cls(count, torch.zeros_like(count), ordered=True)
        positions = count if positions is None else positions
        documents = torch.zeros_like(count) if documents is None else documents
        ordered = tokens.device.type == "cpu" and torch.equal(positions, count)
        return cls(positions, documents, ordered and bool((documents == documents[:, :1]).all()))

    def bias(self, dtype: torch.dtype) -> Tensor:
        """What is added to the scores: (batch, 1, seq, seq), 0 where the query sees the key, else -inf."""
        if self._bias is None or self._bias.dtype != dtype:
            hidden = ~visible(self.positions, self.documents)
            self._bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -math.inf)
        return self._bias


def visible(positions: Tensor, documents: Tensor) -> Tensor:
    """Whether a query (dim 2) sees a key (dim 3): bool, (batch, 1, seq, seq)."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same & (positions[:, None, :, None] >= positions[:, None, None, :])


def attention(q: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
    """Softmax attention scaled by 1 / sqrt(head_dim), masked as `Places` states; returns q's shape and dtype."""
    dtype = q.dtype
    if q.device.type == "cpu" and dtype != torch.float64:
        # Measured without AMX: the CPU kernel takes 1.2 to 2.5 times as long in bfloat16 as in float32.
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    bias = None if places.ordered else places.bias(q.dtype)
    if bias is not None and q.is_cuda:
        # On CUDA no fused kernel takes a mask and grouped heads together; only the slow, large 'math' one does.
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, bias, is_causal=places.ordered, enable_gqa=k.shape[1] != q.shape[1])
    return out.transpose(1, 2).to(dtype)


def reference(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
    """The same in float64, written out: the truth for tests. Returns float64."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~visible(positions, documents), -math.inf).softmax(dim=-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)
