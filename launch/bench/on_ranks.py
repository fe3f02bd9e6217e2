"""Benchmarks on real ranks: their work goes to the ranks as JSON in a folder, and their figures come back so."""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from armillary.launch.lab.run import run_in_lab
from armillary.launch.lab.spec import LabSpec
from armillary.launch.ranks import run_ranks
from armillary.train.failure import RunStopped, guarded, leave

W = TypeVar("W")


def figures_of(module: str, num_ranks: int, work: Any, spec: LabSpec | None = None) -> tuple[list[Any], Any]:
    """What each rank's `serve` has measured, and what the lab's hosts and links did.

    Args:
        module: that calls `serve` as a program.
        work: a dataclass of plain fields, as `serve` names it.
        spec: of a lab with `num_ranks` hosts; None for ranks on this machine.

    Raises:
        RunStopped, RuntimeError: if a rank fails.
    """
    with tempfile.TemporaryDirectory(prefix="armillary-bench-") as folder:
        Path(folder, "work.json").write_text(json.dumps(asdict(work)))
        facts = None
        if spec is None:
            run_ranks(num_ranks, module, [folder])
        else:
            facts = run_in_lab(spec, ["-m", module, folder])
            if facts["exit_code"]:
                raise RunStopped(f"{module}: a rank ended with exit code {facts['exit_code']}; see above")
        files = [Path(folder, f"figures-{rank}.json") for rank in range(num_ranks)]
        return [json.loads(file.read_text()) for file in files], facts


def serve(measure: Callable[[W], Any], kind: type[W]) -> None:
    """The program of a rank, which does not return: leaves what `measure` makes of its work, a dataclass `kind`."""

    def run() -> None:
        import torch
        from pydantic import TypeAdapter

        torch.set_num_threads(1)
        folder, rank = Path(sys.argv[1]), os.environ["RANK"]
        work = TypeAdapter(kind).validate_json((folder / "work.json").read_bytes())
        (folder / f"figures-{rank}.json").write_text(json.dumps(measure(work)))

    leave(guarded(run, "--debug" in sys.argv))
