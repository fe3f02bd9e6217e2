"""Which engine shards the state of the data plane: the keys of `[zero]`. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from armillary.parallel.plan import Partition, Plan


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """The engine of the data plane, dp x cp ranks. Both compute the same and save the same checkpoints."""

    __pydantic_config__ = {"extra": "forbid"}

    engine: Literal["fsdp", "deepspeed"] = "fsdp"
    """fsdp: torch's FSDP2, by the rules of `[partition]`. deepspeed: DeepSpeed's ZeRO, by `zero.stage`."""
    stage: Literal[1, 2, 3] = 3
    """What DeepSpeed shards: optimizer state (1), gradients too (2), weights too (3). Source: arXiv 1910.02054."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """What the fields do not allow: pairs of key and sentence."""
        if self.engine == "fsdp" and self.stage != 3:
            yield (
                "stage",
                f'is {self.stage}, but is for zero.engine = "deepspeed"; with fsdp, leave it out, and for ZeRO-2 set '
                'partition.weights = "rank"',
            )

    def conflicts(self, plan: Plan, partition: Partition, optimizer: str) -> Iterator[tuple[str, str]]:
        """What the rest of a run's config does not allow: pairs of dotted key and sentence.

        Args:
            optimizer: `optim.kind`.
        """
        if self.engine != "deepspeed":
            return
        if plan.pp > 1:
            yield (
                "zero.engine",
                f"deepspeed cannot run the stages of plan.pp = {plan.pp}: its ZeRO reduces after every backward pass "
                'of a whole model; set zero.engine = "fsdp" or plan.pp = 1',
            )
        if optimizer == "muon":
            yield (
                "zero.engine",
                'deepspeed gives an optimizer flat pieces, and Muon needs matrices; set optim.kind = "adamw" or '
                'zero.engine = "fsdp"',
            )
        if partition != Partition():
            yield (
                "zero.engine",
                "deepspeed shards by zero.stage, not by [partition]; leave [partition] out, or set zero.engine = "
                '"fsdp"',
            )
