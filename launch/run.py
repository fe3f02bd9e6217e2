"""`armillary train`: checks, prepares, starts the ranks, and leaves a sample and a report behind."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from armillary.launch.ranks import check_room, start_ranks
from armillary.launch.report import write_report
from armillary.train.config.run_config import check_vocabulary, load_config
from armillary.train.data.config import from_anywhere
from armillary.train.data.dataset import prepare
from armillary.train.failure import REFUSED, say, show
from armillary.train.files import write_aside
from armillary.train.observe.metrics_file import FILE, latest_per_step, read_metrics
from armillary.train.run_folder import RunFolder, create_run, open_run

SAMPLE_TOKENS = 200


def train(
    config_path: Path | None, overrides: Sequence[str], plan: str, resume: str, name: str, debug: bool
) -> tuple[dict[str, Any], int]:
    """Runs or resumes a run on this machine.

    Everything that can be refused is refused here, before a rank starts or a folder is made.

    Returns:
        The last figures of the run, with its folder as `run`; and the exit code.
    """
    old = open_run(resume) if resume else None
    config = load_config(old.config if old else config_path or "", overrides, plan)
    check_room(config.plan.num_ranks)
    dataset = prepare(config.data, say)
    config = replace(config, data=from_anywhere(config.data))
    check_vocabulary(config, dataset.vocab_size)
    if old is None and config.model.weights:
        from armillary.train.initial_weights import checked_weights

        config = replace(config, model=checked_weights(config.model, say))
    folder = old or create_run(config, config_path or "", name, dataset.tokenizer)
    changes = [part for text in overrides for part in ("--set", text)] if old else []
    arguments = ["--resume", str(folder.path), *changes, *(["--plan", plan] if old and plan else [])]
    failure = start_ranks(
        config.plan.num_ranks, "armillary.train", [*arguments, *(["--debug"] if debug else [])], debug
    )
    if failure is None and config.metrics.sample_prompt:
        _write_sample(folder, config.metrics.sample_prompt)
    say(f"\nrun: {folder.path}")
    try:
        say(f"report: {write_report(folder.path)}")
    except OSError as error:
        say(f"report: not written ({error})")
    result = {"run": str(folder.path), "plan": str(config.plan), **_last_figures(folder)}
    if failure is None:
        return result, 0
    show(failure, debug)
    if failure.exit_code != REFUSED:
        print(f"Continue with: armillary train --resume {shlex.quote(str(folder.path))}", file=sys.stderr)
    return result, failure.exit_code


def _last_figures(folder: RunFolder) -> dict[str, Any]:
    """The last value of each metric that the run recorded."""
    path = folder.path / FILE
    figures: dict[str, Any] = {}
    for row in latest_per_step(read_metrics(path)) if path.exists() else []:
        figures |= row
    return figures


def _write_sample(folder: RunFolder, prompt: str) -> None:
    from armillary.train.generate import generate_from_run

    text = generate_from_run(folder.path, prompt, SAMPLE_TOKENS, temperature=0.7, seed=0)
    write_aside(folder.sample, text.encode())
    say(f"\nwhat the model writes after {prompt!r}:\n{text}")
