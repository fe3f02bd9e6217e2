"""Options that several verbs take, and the JSON file that they write. Imports no torch."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

Config = Annotated[Path, typer.Argument(help="a TOML file; see configs/", show_default=False)]
Overrides = Annotated[list[str], typer.Option("--set", metavar="a.b=c", help="override one key; may be repeated")]
PlanText = Annotated[str, typer.Option("--plan", help='degrees and more, short for plan.*: "pp=2,tp=2,schedule=zbv"')]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]
Repetitions = Annotated[int, typer.Option(min=1, help="interleaved repetitions")]


def _writable(path: Path | None) -> Path | None:
    """Refuses now what would only fail when the work is done."""
    if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
        raise ValueError(f"--json {path}: cannot be written; give a file in a folder that exists and can be written")
    return path


Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="write the result as JSON too", callback=_writable),
]


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Writes a result as `--json FILE`, where that was given."""
    if path is not None:
        from armillary.train.files import write_aside

        write_aside(path, json.dumps(result, indent=2).encode() + b"\n")
