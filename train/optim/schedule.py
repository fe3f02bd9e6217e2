"""How a run optimises: the keys of `[optim]`, and the learning rate at each step. Imports no torch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its schedule and its precision."""

    __pydantic_config__ = {"extra": "forbid"}

    kind: Literal["adamw", "muon"] = "adamw"
    """AdamW for all parameters; or Muon for the matrices inside the blocks and AdamW for the rest."""
    learning_rate: float = field(default=3e-4, metadata={"above": 0})
    """AdamW's peak learning rate."""
    steps: int = field(default=100, metadata={"min": 1})
    """Optimizer steps of the whole run."""
    micro_batches: int = field(default=1, metadata={"min": 1})
    """Micro-batches whose gradients each rank adds up before a step; more of them take less memory."""
    warmup_steps: int = field(default=0, metadata={"min": 0})
    """Steps in which the learning rate rises linearly to its peak."""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """After the warm-up: stable then a linear decay (wsd), half a cosine, or the peak for ever."""
    decay_fraction: float = field(default=0.2, metadata={"min": 0, "max": 1})
    """Share of the steps, the last ones, in which `wsd` decays. Source: Hägele et al., arXiv 2405.18392."""
    final_ratio: float = field(default=0.0, metadata={"min": 0, "max": 1})
    """Share of the peak that the decay reaches once the last step is done. Source for 0: arXiv 2502.15938."""
    weight_decay: float = field(default=0.1, metadata={"min": 0})
    """Decoupled decay of matrices, times the learning rate; norms, biases and embeddings do not decay."""
    beta1: float = field(default=0.9, metadata={"min": 0, "below": 1})
    """AdamW's decay of the mean gradient."""
    beta2: float = field(default=0.95, metadata={"min": 0, "below": 1})
    """AdamW's decay of the mean squared gradient."""
    eps: float = field(default=1e-8, metadata={"above": 0})
    """Added to AdamW's denominator."""
    clip_norm: float = field(default=1.0, metadata={"min": 0})
    """Largest norm of the whole gradient; a longer one is scaled down to it. 0: no clipping."""
    precision: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Dtype of forward and backward. Weights and optimizer state are float32, or float64 for float64."""
    muon_learning_rate: float = field(default=0.02, metadata={"above": 0})
    """Muon's peak learning rate; it follows the same schedule."""
    muon_momentum: float = field(default=0.95, metadata={"min": 0, "below": 1})
    """Muon's decay of the mean gradient (Nesterov)."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """What the fields do not allow together: pairs of key and sentence."""
        if self.warmup_steps + self.decay_steps > self.steps:
            decay = f" and the decay {self.decay_steps}" if self.decay_steps else ""
            remedy = " or optim.decay_fraction" if self.decay_steps else ""
            yield (
                "warmup_steps",
                f"the warm-up takes {self.warmup_steps} steps{decay}, but optim.steps = {self.steps}; "
                f"lower optim.warmup_steps{remedy}, or raise optim.steps",
            )

    @property
    def decay_steps(self) -> int:
        """Steps of the linear decay of `wsd`; 0 for the other schedules."""
        return round(self.decay_fraction * self.steps) if self.schedule == "wsd" else 0


def learning_rate_ratio(config: OptimConfig, step: int) -> float:
    """The learning rate of a step as a share of its peak, in [0, 1].

    Args:
        config: the schedule.
        step: counts from 0. From `config.steps` on, the ratio is `final_ratio` (1 for `constant`).

    The warm-up starts above 0 and the decay ends above `final_ratio`, so that no step is lost: with w and d steps
    they are (step + 1) / (w + 1) and, with n steps left, final + (1 - final) n / (d + 1).
    Sources: warmup-stable-decay, MiniCPM, arXiv 2404.06395, section 4; cosine, arXiv 1608.03983.
    """
    if step < min(config.warmup_steps, config.steps):
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    left = max(config.steps - step, 0)
    if config.schedule == "cosine":
        share = 0.5 - 0.5 * math.cos(math.pi * left / max(config.steps - config.warmup_steps, 1))
    else:
        share = min(left / (config.decay_steps + 1), 1.0)
    return config.final_ratio + (1.0 - config.final_ratio) * share
