"""What to do with a step whose loss or gradient is not finite: skip it, roll back, or stop. Imports no torch.

The decisions depend only on the step's loss and gradient norm, which are equal on all ranks, so the ranks agree
without a word. The policy is what PaLM's authors did by hand (arXiv 2204.02311, section 5.1): go back to a checkpoint
and leave out the batches that led to the trouble.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Verdict(StrEnum):
    """What is to be done with a step; each equals its word."""

    ACCEPT = "accept"
    """Update."""
    SKIP = "skip"
    """Do not update; go on with the next batch."""
    ROLL_BACK = "roll_back"
    """Load the newest checkpoint but keep the data cursor, so that the batches since then are not read again."""
    STOP = "stop"
    """End the run."""

    @property
    def accepted(self) -> bool:
        return self is Verdict.ACCEPT


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """How much trouble a run may have."""

    __pydantic_config__ = {"extra": "forbid"}

    max_skips: int = field(default=3, metadata={"min": 0})
    """Steps in a row that may be skipped; one more rolls back."""
    max_rollbacks: int = field(default=1, metadata={"min": 0})
    """Roll-backs that a run may make in all; one more stops it."""


class Guard:
    """Judges each step before its update.

    Accepted steps give the skips back, but not the roll-backs: weights that diverge again some steps after every
    roll-back would otherwise go round for ever. For the same reason `restore` never lowers the count of roll-backs, so
    that it may be called when a roll-back loads a checkpoint, which was written before.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.skips = 0
        self.rollbacks = 0

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """The verdict on a step, to be obeyed: the counts take it as done."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.skips = 0
            return Verdict.ACCEPT
        if self.skips < self.config.max_skips:
            self.skips += 1
            return Verdict.SKIP
        self.skips = 0
        if self.rollbacks < self.config.max_rollbacks:
            self.rollbacks += 1
            return Verdict.ROLL_BACK
        return Verdict.STOP

    def explain(self, verdict: Verdict, step: int, loss: float, grad_norm: float) -> str:
        """The log's words on the verdict just given: what happened, what is done, what the user can change."""
        what = f"step {step}: loss {loss:.6g}, gradient norm {grad_norm:.6g}"
        if verdict is Verdict.ACCEPT:
            return f"{what}: accepted"
        if verdict is Verdict.SKIP:
            return (
                f"{what}: not finite, so the weights stay as they were and the next batch is tried "
                f"(skip {self.skips} of {self.config.max_skips} in a row). "
                "If it happens often, lower optim.learning_rate or lengthen optim.warmup_steps."
            )
        what = f"{what}: not finite, after {self.config.max_skips} skipped steps in a row"
        if verdict is Verdict.ROLL_BACK:
            return (
                f"{what}; the newest checkpoint is loaded and the batches since then are left out "
                f"(roll-back {self.rollbacks} of {self.config.max_rollbacks}). "
                "Lower optim.learning_rate or optim.clip_norm if it comes back."
            )
        return (
            f"{what}, and all {self.config.max_rollbacks} roll-backs are used up: the run stops. "
            "Lower optim.learning_rate or optim.clip_norm, look at the data of this step, or allow more with "
            "guard.max_skips and guard.max_rollbacks; then resume."
        )

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"skips": self.skips, "rollbacks": self.rollbacks}

    def restore(self, state: Mapping[str, int]) -> None:
        """Takes over what `state` gave, but keeps the larger count of roll-backs.

        Raises:
            ValueError: if these are not two counts.
        """
        if set(state) != {"skips", "rollbacks"} or any(type(n) is not int or n < 0 for n in state.values()):
            raise ValueError(
                f"guard: the saved state is {dict(state)!r}, not counts of skips and rollbacks; "
                "resume from another checkpoint"
            )
        self.skips, self.rollbacks = state["skips"], max(self.rollbacks, state["rollbacks"])
