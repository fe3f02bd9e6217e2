"""The command line: `armillary VERB`. Verbs import what they need when they run, so that --help answers at once."""

import argparse
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from armillary.launch.bench.verbs import bench
from armillary.launch.lab.verb import lab
from armillary.launch.options import Config, Debug, Json, Overrides, PlanText, write_result
from armillary.train.failure import FAILED, REFUSED, describe, leave, make_streams_safe, show

app = typer.Typer(
    name="armillary",
    help="Train language models on the cluster you really have. Start with: armillary train configs/demo.toml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="a TOML file; see configs/", show_default=False)] = None,
    overrides: Overrides = [],  # noqa: B006 (typer reads the default)
    plan: PlanText = "",
    resume: Annotated[str, typer.Option(metavar="RUN", help="continue this run from its newest checkpoint")] = "",
    name: Annotated[str, typer.Option(help="name of the new run's folder in runs/")] = "",
    output: Json = None,
    debug: Debug = False,
) -> None:
    """Train a model: starts the ranks that the plan needs on this machine, or joins those that torchrun has started."""
    if bool(config) == bool(resume):
        raise ValueError("give either a CONFIG or --resume RUN; for example: armillary train configs/demo.toml")
    if resume and name:
        raise ValueError(f"--name {name}: a resumed run keeps its name; leave --name out")
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        if output:
            raise ValueError("--json: a rank has no result of its own; read metrics.jsonl in the run's folder")
        from armillary.train.__main__ import run_as_rank

        options = {"config": config, "overrides": overrides, "plan": plan, "resume": resume, "name": name}
        leave(run_as_rank(argparse.Namespace(**options, debug=debug)))
    from armillary.launch.run import train as start

    result, exit_code = start(config, overrides, plan, resume, name, debug)
    write_result(output, result)
    raise typer.Exit(exit_code)


@app.command()
def parity(
    config: Config,
    overrides: Overrides = [],  # noqa: B006
    plan: PlanText = "",
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps")] = 2,
    dtype: Annotated[str, typer.Option(help="float64 or float32")] = "float64",
    output: Json = None,
    debug: Debug = False,
) -> None:
    """Prove that a plan computes what one process computes: loss, every gradient, every parameter."""
    from armillary.launch.parity import prove

    result = prove(config, overrides, plan, steps, dtype, debug)
    write_result(output, result)
    raise typer.Exit(0 if result["ok"] else FAILED)


@app.command()
def matrix(
    ranks: Annotated[int, typer.Option(help="leave out cases of more ranks")] = 8,
    full: Annotated[
        bool, typer.Option("--full", help="the product of all features, not a set with every pair")
    ] = False,
    count: Annotated[int, typer.Option("--sample", help="with --full: so many cases, drawn at random")] = 0,
    seed: Annotated[int, typer.Option(help="with --sample: of the drawing")] = 0,
    output: Json = None,
    debug: Debug = False,
) -> None:
    """Prove that every pair of features, in one run, computes what one process computes."""
    from armillary.launch.matrix import run_matrix

    result = run_matrix(ranks, full, count, seed)
    write_result(output, result)
    raise typer.Exit(0 if result["ok"] else FAILED)


@app.command()
def evaluate(run: str, output: Json = None, debug: Debug = False) -> None:
    """Held-out loss and bits per byte of a run's newest checkpoint."""
    from armillary.train.run_folder import open_run

    open_run(run)  # refused before torch is loaded, for seconds
    from armillary.train.evaluate import evaluate_run

    result = evaluate_run(run)
    print(f"step {result['step']}: loss {result['loss']:.4f} nats a token, {result['bits_per_byte']:.4f} bits per byte")
    write_result(output, result)


@app.command()
def generate(
    run: str,
    prompt: str,
    tokens: Annotated[int, typer.Option(min=1, help="how many to write")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token")] = 0.8,
    seed: Annotated[int, typer.Option(min=0, help="of the random choices")] = 0,
    output: Json = None,
    debug: Debug = False,
) -> None:
    """Let a run's newest checkpoint continue a text."""
    from armillary.train.run_folder import open_run

    open_run(run)  # refused before torch is loaded, for seconds
    from armillary.train.generate import generate_from_run

    text = generate_from_run(run, prompt, tokens, temperature, seed)
    print(text)
    write_result(output, {"prompt": prompt, "text": text})


@app.command("import-hf")
def import_hf(
    path: Annotated[Path, typer.Argument(help="a folder with config.json and *.safetensors, or a GGUF file")],
    name: Annotated[str, typer.Option(help="name of the new run's folder in runs/; else that of PATH")] = "",
    output: Json = None,
    debug: Debug = False,
) -> None:
    """Make a run of a Hugging Face model: generate with it, or begin other runs with its weights (model.weights)."""
    from armillary.train.huggingface.check import LogitsDiffer
    from armillary.train.huggingface.import_model import import_hf as start

    try:
        result = start(path, name)
    except LogitsDiffer as error:
        write_result(output, error.result)
        raise
    print(f"run: {result['run']}")
    write_result(output, result)


@app.command("export-hf")
def export_hf(
    run: str,
    path: Annotated[Path, typer.Argument(help="the new folder")],
    dtype: Annotated[str, typer.Option(help="of the tensors: float32 or bfloat16")] = "float32",
    output: Json = None,
    debug: Debug = False,
) -> None:
    """Write a run's newest checkpoint as a folder that Hugging Face's transformers loads."""
    from armillary.train.huggingface.check import LogitsDiffer
    from armillary.train.huggingface.export_model import export_hf as start

    try:
        result = start(run, path, dtype)
    except LogitsDiffer as error:
        write_result(output, error.result)
        raise
    write_result(output, result)


@app.command()
def report(runs: list[str], debug: Debug = False) -> None:
    """Write the report.html of one or more runs: loss, throughput, events, config, each in one file."""
    from armillary.launch.report import write_report
    from armillary.train.run_folder import open_run

    for folder in [open_run(run) for run in runs]:
        print(write_report(folder.path))


app.command(context_settings={"allow_interspersed_args": False})(lab)
app.add_typer(bench, name="bench", no_args_is_help=True)


def run() -> int:
    """Runs a verb: 0 for success, 1 for a failed check, 2 for a refused input; no tracebacks for people."""
    debug = "--debug" in sys.argv
    try:
        # Without its standalone mode, click returns the code of a typer.Exit.
        return app(standalone_mode=False) or 0
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except Exception as error:
        if callable(tell := getattr(error, "show", None)):
            # A mistake in the usage. typer's exceptions are click's in some versions, and its own in others.
            tell()
            return REFUSED
        failure = describe(error, int(os.environ.get("RANK", "0")))
        show(failure, debug)
        return failure.exit_code


def main() -> NoReturn:
    """The command `armillary`."""
    make_streams_safe()
    leave(run())
