"""What of a micro-batch is this rank's: all of it, or under context parallelism its share of the tokens of each row."""

from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch

from armillary.kernels.attention.places import Places
from armillary.parallel.context.layout import Placement, lay_out
from armillary.parallel.mesh import Ranks
from armillary.parallel.runner import Part
from armillary.train.data.dataset import Batch
from armillary.train.data.packing import IGNORE


@dataclass(frozen=True)
class Share:
    """Tokens and labels (batch, the rank's tokens), int64, and where they stand."""

    tokens: np.ndarray
    labels: np.ndarray
    places: Places

    @property
    def num_labels(self) -> int:
        """How many of its tokens carry a label."""
        return int((self.labels != IGNORE).sum())

    def on(self, device: torch.device) -> Part:
        """The same on a device."""
        tokens, labels = (torch.from_numpy(each).to(device, non_blocking=True) for each in (self.tokens, self.labels))
        return Part(tokens, labels, self.places)


def share(batch: Batch, ranks: Ranks, placement: str) -> Share:
    """This rank's share, the same on no other. Labels were shifted before: each travels with its token.

    Args:
        placement: how `parallel/context/layout.py` deals tokens out; auto goes by the mask and the documents.
    """
    size = ranks.context.size()
    if size == 1:
        return Share(batch.tokens, batch.labels, Places.of(batch.positions, batch.documents))
    chosen: Placement | None = next((name for name in get_args(Placement) if name == placement), None)
    layout = lay_out(batch.positions, batch.documents, size, chosen)
    rank = ranks.context.rank()
    return Share(layout.take(batch.tokens, rank), layout.take(batch.labels, rank), layout.places(rank))
