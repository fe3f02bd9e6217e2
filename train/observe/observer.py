"""What a run shows and records of itself: the status line, metrics, events. Only rank 0 speaks and writes."""

import math
import statistics
from collections import deque
from dataclasses import asdict
from typing import Any

import torch

from armillary.comm.collectives import all_reduce
from armillary.parallel.mesh import Ranks
from armillary.train.config.run_config import RunConfig
from armillary.train.model.shape import flops_per_token, num_parameters
from armillary.train.observe.meter import Meter, NullMeter, speed
from armillary.train.observe.peak import peak_flops, peak_memory_gib
from armillary.train.observe.sinks import Ending
from armillary.train.observe.status import NullStatus, Status
from armillary.train.run_folder import RunFolder


class Observer:
    """Told of every step, evaluation and event; knows how to show and keep them."""

    def __init__(self, config: RunConfig, ranks: Ranks, folder: RunFolder) -> None:
        self._config, self._ranks = config, ranks
        self._peak, self._peak_origin = _peak_of_all(config.optim.precision, ranks)
        self._flops_per_token = flops_per_token(config.model, config.data.sequence_length)
        self._step_times: deque[float] = deque(maxlen=20)
        speaks = ranks.rank == 0
        self._status = Status(config.optim.steps) if speaks else NullStatus()
        self._meter = Meter(folder.path, config.metrics, asdict(config), self.note) if speaks else NullMeter()

    def begin(self, step: int, message: str, **facts: object) -> None:
        """The run starts, or goes on, at a step."""
        peak = {"peak_flops": self._peak, "peak_origin": self._peak_origin} if self._peak else {}
        facts |= {"parameters": num_parameters(self._config.model), "flops_per_token": self._flops_per_token} | peak
        self.event(step, "resume" if step else "begin", message, ranks=self._ranks.num_ranks, **facts)

    def step(self, step: int, tokens: int, seconds: float, loss: float, norm: float, learning_rate: float) -> None:
        """A step ended; `tokens` is the count since the run began."""
        self._step_times.append(seconds)
        batch = self._config.data.batch_size * self._config.data.sequence_length
        figures = speed(
            batch,
            seconds,
            self._ranks.num_ranks,
            flops_per_token=self._flops_per_token,
            peak_flops=self._peak,
        )
        memory = peak_memory_gib(self._ranks.device.type)
        moved = {f"comm/bytes_{name}": count for name, count in self._ranks.ledger.by_purpose().items()}
        if self._config.metrics.row_due(step, self._config.optim.steps):
            train = {"train/loss": loss, "train/grad_norm": norm, "train/learning_rate": learning_rate}
            row = {**train, "train/tokens": tokens, **figures, "mem/peak_gib": memory, **moved}
            self._meter.log(step, row)
        usual = statistics.median(self._step_times)
        rate = batch / usual
        mfu = rate * self._flops_per_token / self._peak if self._peak else None
        self._status.update(step, loss, rate, mfu, memory)

    def evaluation(self, step: int, loss: float, bits_per_byte: float) -> None:
        """The held-out text was evaluated."""
        self._meter.log(step, {"eval/loss": loss, "eval/bits_per_byte": bits_per_byte})
        self._status.evaluated(loss)
        self.note(f"step {step}: held-out loss {loss:.4f} nats a token, {bits_per_byte:.4f} bits per byte")

    def event(self, step: int, kind: str, message: str, **facts: object) -> None:
        """Something happened that a person should see and find again."""
        self._meter.event(step, kind, message, **facts)
        self.note(message)

    def note(self, text: str) -> None:
        """A line above the status line."""
        self._status.note(text)

    def close(self, ending: Ending, message: str = "") -> None:
        self._status.close()
        self._meter.close(ending, message)


def _peak_of_all(precision: str, ranks: Ranks) -> tuple[float | None, str]:
    """What all ranks together could do at best, in floating-point operations per second, and where that comes from."""
    talk: dict[str, Any] = {"group": ranks.everyone, "ledger": ranks.ledger, "purpose": "setup"}
    device = ranks.device.type
    name = torch.cuda.get_device_name(ranks.device) if device == "cuda" else "cpu"
    own, origin = peak_flops(device, name, precision, lambda: all_reduce(torch.zeros(1, device=ranks.device), **talk))
    total = all_reduce(torch.tensor(own or math.nan, device=ranks.device, dtype=torch.float64), **talk).item()
    return (total if math.isfinite(total) else None), origin
