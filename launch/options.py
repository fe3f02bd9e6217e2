"""Options that several verbs take, and the JSON file that they write. Imports no torch."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Config = Annotated[Path, typer.Argument(help="a TOML file; see configs/", show_default=False)]
Overrides = Annotated[list[str], typer.Option("--set", metavar="a.b=c", help="override one key; may be repeated")]
PlanText = Annotated[str, typer.Option("--plan", help='degrees and more, short for plan.*: "pp=2,tp=2,schedule=zbv"')]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]
Repetitions = Annotated[int, typer.Option(min=1, help="interleaved repetitions")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the result as JSON too")]


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Writes a result as `--json FILE`, where that was given."""
    if path is not None:
        from armillary.train.files import write_aside

        write_aside(path, json.dumps(result, indent=2).encode() + b"\n")
