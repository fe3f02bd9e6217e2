"""The plan of a run: who holds what, as data that can be printed, compared and saved. Imports no torch."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Degrees of the mesh axes; their product is the number of ranks."""

    __pydantic_config__ = {"extra": "forbid"}

    dp: int = field(default=1, metadata={"min": 1})
    """Data-parallel degree: ranks among which weights, gradients and optimizer are sharded (ZeRO-3, as FSDP2 does
    it), and each of which computes its own sequences."""

    @property
    def num_ranks(self) -> int:
        return self.dp

    def __str__(self) -> str:
        return f"dp={self.dp}"
