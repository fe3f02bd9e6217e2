"""`armillary bench attention`: the CPU path beside torch's math backend and whatever torch chooses itself. Forward and
backward.

`ratio` says how many times as fast as torch's math backend, which multiplies all pairs and keeps all scores.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from armillary.kernels.attention.call import CAUSAL, attention
from armillary.kernels.attention.choice import CHOICES
from armillary.kernels.attention.mask import Mask
from armillary.kernels.attention.places import Places
from armillary.launch.bench.turns import interleaved
from armillary.launch.rows import Row, print_table

HEADS, HEAD_DIM = 8, 64
LENGTHS = (512, 1024, 2048, 4096)
DOCUMENTS = (700, 40, 300, 250, 510, 120, 100, 28)
"""Tokens of the documents of the packed case; together 2,048."""


@dataclass(frozen=True)
class Case:
    """One row of tokens and its rule, as ours and as torch's."""

    name: str
    places: Places
    mask: Mask
    dtype: torch.dtype

    def ours(self, inputs: list[Tensor], pull: Tensor) -> None:
        q, k, v = inputs
        attention(q, k, v, self.places, mask=self.mask).out.backward(pull)

    def torchs(self, inputs: list[Tensor], pull: Tensor) -> None:
        """With a mask of all pairs where there are documents, made anew in every call as a training step would."""
        q, k, v = (tensor.transpose(1, 2) for tensor in inputs)
        documents, bias = self.places.documents(), None
        if not self.places.in_one_piece:
            shown = (documents[:, :, None] == documents[:, None, :])[:, None].tril()
            bias = torch.zeros(shown.shape, dtype=self.dtype).masked_fill_(~shown, float("-inf"))
        out = F.scaled_dot_product_attention(q, k, v, bias, is_causal=self.mask.causal and bias is None)
        out.transpose(1, 2).backward(pull)

    def torchs_math(self, inputs: list[Tensor], pull: Tensor) -> None:
        with sdpa_kernel(SDPBackend.MATH):
            self.torchs(inputs, pull)


def cases(lengths: tuple[int, ...] = LENGTHS) -> Iterator[Case]:
    """Causal and full attention at each length, and packed documents, in both dtypes."""
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        for length in lengths:
            yield Case(f"causal {length} {kind}", Places.in_order(1, length), CAUSAL, dtype)
            yield Case(f"full {length} {kind}", Places.in_order(1, length), Mask(causal=False), dtype)
        positions = np.concatenate([np.arange(length) for length in DOCUMENTS])
        documents = np.repeat(np.arange(len(DOCUMENTS)), DOCUMENTS)
        yield Case(f"packed 2048 {kind}", Places.of(positions[None], documents[None]), CAUSAL, dtype)


def rows(repetitions: int, lengths: tuple[int, ...] = LENGTHS) -> list[Row]:
    """Batch 1, 8 heads, head_dim 64, forward and backward together, in as many threads as torch is set to.

    The peak of memory is not measured, so `bytes` is 0.
    """
    found: list[Row] = []
    for case in cases(lengths):
        shape = (1, case.places.seq, HEADS, HEAD_DIM)
        inputs = [torch.randn(shape, dtype=case.dtype).requires_grad_() for _ in range(3)]
        pull = torch.randn(shape, dtype=case.dtype)

        def turn(call: Callable[..., None], inputs: list[Tensor] = inputs, pull: Tensor = pull) -> Callable[[], None]:
            return lambda: call(inputs, pull)

        peers = {"ours": case.ours, "torch, its choice": case.torchs, "torch, math": case.torchs_math}
        seconds = interleaved({name: turn(call) for name, call in peers.items()}, repetitions)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        for name, median in medians.items():
            found.append(
                {
                    "name": f"{case.name}: {name}",
                    "seconds": median,
                    "ratio": medians["torch, math"] / median,
                    "bytes": 0,
                    "measured": True,
                    "note": f"forward and backward, 1 row, 8 heads of 64, {torch.get_num_threads()} threads",
                }
            )
    return found


def print_choices() -> list[Row]:
    """Prints and returns the table of implementations: the first line that applies to a call computes it."""
    choices = [{"implementation": each.implementation, "where": each.where, "why": each.why} for each in CHOICES]
    print_table([list(choices[0]), *(list(each.values()) for each in choices)])
    return choices
