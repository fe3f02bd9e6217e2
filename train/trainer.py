"""A run: the loop over steps, and what happens around it."""

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from armillary.parallel.mesh import Ranks
from armillary.train.build import build_engine
from armillary.train.checkpoint.restore import (
    check_same_data,
    load_state,
    newest_sound,
    own_state,
    shared_state,
    weights_are_finite,
)
from armillary.train.checkpoint.save import Checkpointer
from armillary.train.config.run_config import RunConfig
from armillary.train.data.dataset import Batch, Dataset, held_out_batches, micro_batches
from armillary.train.failure import RunStopped
from armillary.train.guard import Guard, Verdict
from armillary.train.initial_weights import take_weights
from armillary.train.model.shape import num_parameters
from armillary.train.observe.observer import Observer
from armillary.train.optim.schedule import learning_rate_ratio
from armillary.train.proof.verify import verify_plan
from armillary.train.resolve import resolve
from armillary.train.run_folder import RunFolder


@dataclass(frozen=True)
class Progress:
    """Where a run stands. `cursor` counts sequences taken from the data: a roll-back moves `step` back, not it."""

    step: int = 0
    cursor: int = 0
    tokens: int = 0


class Trainer:
    """Trains a model on the ranks it is given."""

    def __init__(self, config: RunConfig, ranks: Ranks, folder: RunFolder, dataset: Dataset, attempt: str) -> None:
        """
        Args:
            config: the resolved config; what its plan leaves to be measured is decided here, and written to the folder.
            ranks: the mesh of its plan.
            folder: where the run lives.
            dataset: prepared from `config.data`.
            attempt: a name for this start of the run, the same on all ranks and unlike that of any other start.
        """
        config, self.choices = resolve(config, ranks)
        self.config, self.ranks, self.folder, self.dataset = config, ranks, folder, dataset
        torch.manual_seed(config.model.seed)
        self.engine = build_engine(config, ranks)
        self.held, self.optimizers = self.engine.held, self.engine.optimizers
        self.guard = Guard(config.guard)
        self.observer = Observer(config, ranks, folder)
        self.checkpointer = Checkpointer(
            folder.checkpoints, config.checkpoint, ranks.rank, ranks.num_ranks, attempt, self.observer.note
        )
        self.progress = Progress()

    def run(self) -> None:
        """Trains to the last step, from the newest sound checkpoint or from the start."""
        self.begin()
        while self.progress.step < self.config.optim.steps:
            self.train_step()
            self.evaluate_if_due()
            self.save_if_due()
        self.checkpointer.wait()
        if self.checkpointer.failure:
            raise RunStopped(f"the last checkpoint could not be saved: {self.checkpointer.failure}")

    def begin(self) -> None:
        """Goes back to the newest sound checkpoint, if there is one; else takes the weights that the config names."""
        for choice in filter(None, (*self.choices, self.engine.note)):
            self.observer.note(choice)
        facts = self.restore()
        if facts is not None:
            self.guard.restore(facts["guard"])
        else:
            take_weights(self.config.model, self.held, self.observer.note)
        if self.ranks.rank == 0:
            # What a resume changed, the next one needs not be told again.
            self.folder.save_config(self.config)
        size = f"{num_parameters(self.config.model):,} parameters"
        where = f"{self.ranks.num_ranks} ranks ({self.ranks.device.type})"
        start = f"resumed at step {self.progress.step} on {where}" if facts else f"{size} on {where}"
        if facts and self.progress.step >= self.config.optim.steps:
            start += f"; there is nothing left to train, since optim.steps is {self.config.optim.steps}"
        sizes = {"train_tokens": self.dataset.train_size.tokens, "held_out_tokens": self.dataset.held_out_size.tokens}
        self.observer.begin(self.progress.step, start, **sizes)
        verify_plan(self.config, self.ranks, self.observer, self.progress.step)
        if facts is None:
            self.evaluate_if_due()

    def train_step(self) -> None:
        """One optimizer step, or none if the guard finds the loss or the gradient unsound."""
        self.ranks.ledger.clear()
        started = time.perf_counter()
        ratio = learning_rate_ratio(self.config.optim, self.progress.step)
        total = self.engine.forward_backward(self.take_batches())
        norm = self.engine.gradient_norm()
        # Read together: on a GPU the host waits here, once.
        loss, length = torch.stack((total, norm.double())).tolist()
        verdict = self.guard.judge(loss, length)
        if verdict.accepted:
            self.engine.clip(norm, self.config.optim.clip_norm)
            self.optimizers.step(ratio)
        self.optimizers.zero_grad()
        rate = ratio * self.config.optim.learning_rate
        self.observer.step(self.progress.step, self.progress.tokens, time.perf_counter() - started, loss, length, rate)
        if not verdict.accepted:
            self.recover(verdict, loss, length)

    def take_batches(self) -> list[Batch]:
        """This rank's micro-batches of the next step; moves `progress` on."""
        size = self.config.data.batch_size
        data = self.ranks.data
        batches = micro_batches(
            self.dataset, self.progress.cursor, size, self.config.optim.micro_batches, data.rank(), data.size()
        )
        tokens = self.progress.tokens + size * self.config.data.sequence_length
        self.progress = Progress(self.progress.step + 1, self.progress.cursor + size, tokens)
        return batches

    def recover(self, verdict: Verdict, loss: float, norm: float) -> None:
        """Does what the guard asks for after an unsound step."""
        step = self.progress.step
        explanation = self.guard.explain(verdict, step, loss, norm)
        if verdict is Verdict.SKIP:
            self.observer.event(step, "skip", explanation)
            return
        if verdict is Verdict.ROLL_BACK:
            self.checkpointer.wait()
            unsound = self.progress
            if self.restore() is not None:
                self.progress = replace(unsound, step=self.progress.step)
                self.observer.event(step, "rollback", explanation, to_step=self.progress.step)
                return
            explanation += " There is no checkpoint to go back to; set checkpoint.every lower."
        self.observer.event(step, "stop", explanation)
        self.checkpointer.wait()
        raise RunStopped(explanation)

    def evaluate_if_due(self) -> None:
        """Held-out loss and bits per byte, at the steps that the config says."""
        settings, step = self.config.metrics, self.progress.step
        if self.dataset.num_held_out == 0 or not settings.evaluation_due(step, self.config.optim.steps):
            return
        data = self.ranks.data
        each = -(-self.config.data.batch_size // (data.size() * self.config.optim.micro_batches))
        batches = held_out_batches(self.dataset, settings.evaluate_sequences or None, each, data.rank(), data.size())
        self.observer.evaluation(step, *self.engine.evaluate(batches, self.dataset))

    def save_if_due(self) -> None:
        """Starts to write a checkpoint, at the steps that the config says and after the last.

        Raises:
            RunStopped: if the run's folder is gone: what would be saved without its config, nothing could resume.
        """
        step, every = self.progress.step, self.config.checkpoint.every
        last = step == self.config.optim.steps
        if (last or (every > 0 and step % every == 0)) and self.is_sound(last):
            if self.ranks.rank == 0 and not self.folder.config.exists():
                raise RunStopped(f"{self.folder.config} is gone: was the run's folder moved or removed while it ran?")
            facts = {
                "progress": asdict(self.progress),
                "guard": self.guard.state(),
                "data": self.dataset.fingerprint,
                "plan": str(self.config.plan),
            }
            self.checkpointer.save(step, shared_state(self.held, self.optimizers), own_state(), facts)

    def is_sound(self, last: bool) -> bool:
        """Whether this state may replace a checkpoint: the guard accepted the step, and all weights are finite.

        An update can overflow though its gradient was finite; only the next loss would show it.

        Raises:
            RunStopped: if there is no next step to show it.
        """
        finite = not self.ranks.largest(int(not weights_are_finite(self.held)))
        if finite and self.guard.skips == 0:
            return True
        reason = "was skipped" if finite else "left weights that are not finite"
        message = f"step {self.progress.step} {reason}, so no checkpoint is saved of it"
        self.observer.event(self.progress.step, "unsound", message)
        if last:
            self.checkpointer.wait()
            raise RunStopped(f"{message}. Lower optim.learning_rate, then resume: the checkpoint before is sound")
        return False

    def restore(self) -> dict[str, Any] | None:
        """Loads the newest sound checkpoint and returns the facts saved with it; None if there are no checkpoints.

        Raises:
            ValueError: if none of them is sound, or it is of another model or another corpus.
        """
        path = newest_sound(
            self.folder.checkpoints,
            self.ranks,
            lambda message: self.observer.event(self.progress.step, "damaged", message),
        )
        if path is None:
            return None
        facts = load_state(path, self.held, self.optimizers)
        check_same_data(path, facts, self.dataset)
        self.progress = Progress(**facts["progress"])
        return facts
