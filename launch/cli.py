"""The command line: `armillary VERB`. Verbs import what they need when they run, so that --help answers at once."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from armillary.train.failure import FAILED, REFUSED, describe, leave, show

app = typer.Typer(
    name="armillary",
    help="Train language models on the cluster you really have. Start with: armillary train configs/demo.toml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Config = Annotated[Path, typer.Argument(help="a TOML file; see configs/", show_default=False)]
Overrides = Annotated[list[str], typer.Option("--set", metavar="a.b=c", help="override one key; may be repeated")]
PlanText = Annotated[str, typer.Option("--plan", help='degrees and more, short for plan.*: "pp=2,tp=2,schedule=zbv"')]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]
Repetitions = Annotated[int, typer.Option(min=1, help="interleaved repetitions")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the result as JSON too")]


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
    if "RANK" in os.environ:
        if output:
            raise ValueError("--json: a rank has no result of its own; read metrics.jsonl in the run's folder")
        _join(argparse.Namespace(config=config, overrides=overrides, plan=plan, resume=resume, name=name, debug=debug))
    from armillary.launch.run import train as start

    result, exit_code = start(config, overrides, plan, resume, name, debug)
    _write(output, result)
    raise typer.Exit(exit_code)


def _join(options: argparse.Namespace) -> NoReturn:
    from armillary.train.__main__ import run_as_rank

    leave(run_as_rank(options))


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
    _write(output, result)
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
    _write(output, result)
    raise typer.Exit(0 if result["ok"] else FAILED)


@app.command()
def evaluate(run: str, output: Json = None, debug: Debug = False) -> None:
    """Held-out loss and bits per byte of a run's newest checkpoint."""
    from armillary.train.evaluate import evaluate_run

    result = evaluate_run(run)
    print(f"step {result['step']}: loss {result['loss']:.4f} nats a token, {result['bits_per_byte']:.4f} bits per byte")
    _write(output, result)


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
    from armillary.train.generate import generate_from_run

    text = generate_from_run(run, prompt, tokens, temperature, seed)
    print(text)
    _write(output, {"prompt": prompt, "text": text})


@app.command("import-hf")
def import_hf(
    path: Annotated[Path, typer.Argument(help="a folder with config.json and *.safetensors, or a GGUF file")],
    name: Annotated[str, typer.Option(help="name of the new run's folder in runs/; else that of PATH")] = "",
    output: Json = None,
    debug: Debug = False,
) -> None:
    """Make a run of a Hugging Face model: generate with it, or begin other runs with its weights (model.weights)."""
    from armillary.train.huggingface.convert import LogitsDiffer
    from armillary.train.huggingface.convert import import_hf as start

    try:
        result = start(path, name)
    except LogitsDiffer as error:
        _write(output, error.result)
        raise
    print(f"run: {result['run']}")
    _write(output, result)


@app.command("export-hf")
def export_hf(
    run: str,
    path: Annotated[Path, typer.Argument(help="the new folder")],
    dtype: Annotated[str, typer.Option(help="of the tensors: float32 or bfloat16")] = "float32",
    output: Json = None,
    debug: Debug = False,
) -> None:
    """Write a run's newest checkpoint as a folder that Hugging Face's transformers loads."""
    from armillary.train.huggingface.convert import LogitsDiffer
    from armillary.train.huggingface.convert import export_hf as start

    try:
        result = start(run, path, dtype)
    except LogitsDiffer as error:
        _write(output, error.result)
        raise
    _write(output, result)


@app.command()
def report(runs: list[str], debug: Debug = False) -> None:
    """Write the report.html of one or more runs: loss, throughput, events, config, each in one file."""
    from armillary.launch.report import write_report
    from armillary.train.run_folder import open_run

    for folder in [open_run(run) for run in runs]:
        print(write_report(folder.path))


@app.command(context_settings={"allow_interspersed_args": False})
def lab(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND", help="what to run on every host")] = [],  # noqa: B006
    hosts: Annotated[int, typer.Option(help="how many hosts")] = 2,
    rate: Annotated[str, typer.Option(help="of each host's link; one, or one a host")] = "1gbit",
    topology: Annotated[str, typer.Option(help="star (one port a host), ring or mesh (a link a pair)")] = "star",
    levels: Annotated[str, typer.Option(help='groups of hosts, from the innermost out: "pair:2,node:4"')] = "",
    slow_rate: Annotated[str, typer.Option(help="between the groups of each level: 50mbit,20mbit")] = "",
    cpus: Annotated[str, typer.Option(help="cores of each host; one, or one a host: 0.5,0.5,0.25")] = "",
    memory: Annotated[str, typer.Option(help="limit of each host; one, or one a host: 2g")] = "",
    ranks_per_host: Annotated[int, typer.Option(help="times that COMMAND runs on each host")] = 1,
    delay: Annotated[str, typer.Option(help="of each link, one way: 5ms; a star has two links between hosts")] = "",
    clean: Annotated[bool, typer.Option("--clean", help="only remove what killed labs have left behind")] = False,
    output: Json = None,
    debug: Debug = False,
) -> None:
    """Run a command on an uneven cluster: hosts on this machine with rate-limited links, CPU quotas, memory limits."""
    from armillary.launch.lab.run import remove_leftovers, run_in_lab
    from armillary.launch.lab.spec import read_spec

    if clean:
        remove_leftovers()
        return
    spec = read_spec(hosts, rate, topology, levels, slow_rate, cpus, memory, ranks_per_host, delay)
    result = run_in_lab(spec, command)
    _write(output, result)
    raise typer.Exit(result["exit_code"])


class _Benchmarks(TyperGroup):
    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        from armillary.launch.bench.by_name import module_of

        if args[0] not in self.commands:
            module_of(args[0])
        return super().resolve_command(ctx, args)


bench = typer.Typer(help="Measure against peers, on the same work, interleaved in one run.", cls=_Benchmarks)
app.add_typer(bench, name="bench", no_args_is_help=True)


@bench.command("train")
def bench_train(repetitions: Repetitions = 5, output: Json = None, debug: Debug = False) -> None:
    """A trainer's whole step against a bare loop over the same model and batch."""
    from armillary.launch.bench.by_name import run_benchmark

    _write(output, run_benchmark("train", repetitions))


@bench.command("attention")
def bench_attention(
    repetitions: Repetitions = 5,
    io: Annotated[bool, typer.Option("--io", help="meter bytes and FLOP of the GPU kernels, on any machine")] = False,
    choices: Annotated[bool, typer.Option("--choices", help="print which implementation computes what")] = False,
    seq: Annotated[int | None, typer.Option(min=1, help="with --io: tokens of the row")] = None,
    head_dim: Annotated[int | None, typer.Option(min=1, help="with --io: channels of a head")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="with --io: query heads")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="with --io: key heads")] = None,
    mask: Annotated[
        str, typer.Option(help='with --io: "full", or "causal,window=4096,sinks=64,block=64,stride=8"')
    ] = "",
    documents: Annotated[
        str, typer.Option(metavar="LIST", help="with --io: lengths in the row, 1000,3000 or a file")
    ] = "",
    measure: Annotated[bool, typer.Option("--measure", help="with --io: also ask ncu what a GPU really moves")] = False,
    output: Json = None,
    debug: Debug = False,
) -> None:
    """Attention against torch's on this machine; or its I/O meter, or its table of choices."""
    from armillary.launch.bench.by_name import run_benchmark, with_facts

    if not io and any((seq, head_dim, heads, kv_heads, mask, documents, measure)):
        raise ValueError(
            "bench attention: sizes, --mask, --documents and --measure describe what --io meters; add --io"
        )
    if io and choices:
        raise ValueError("bench attention: give either --io or --choices")
    if choices:
        from armillary.launch.bench.attention import print_choices

        result = with_facts("attention", print_choices(), 0)
    elif io:
        from armillary.launch.bench import attention_io

        wanted = attention_io.cases(seq, head_dim, heads, kv_heads, mask, documents)
        result = with_facts("attention", attention_io.print_io(wanted, measure), 0)
    else:
        result = run_benchmark("attention", repetitions)
    _write(output, result)


@bench.command("context")
def bench_context(
    repetitions: Repetitions = 5,
    regime: Annotated[
        str, typer.Option(help="communication (short shards, slow links) or compute: what is left out below")
    ] = "communication",
    tokens: Annotated[int | None, typer.Option(min=1, help="of each rank")] = None,
    heads: Annotated[str, typer.Option(help="query heads and key heads of each case")] = "8:8,8:1",
    strategies: Annotated[str, typer.Option(metavar="LIST", help="ring,token_ring,...; all if left out")] = "",
    ranks: Annotated[int | None, typer.Option(help="processes on this machine; 4 if left out")] = None,
    topology: Annotated[str, typer.Option("--lab", help="measure in a lab instead: star, mesh or ring")] = "",
    hosts: Annotated[int | None, typer.Option(help="with --lab: how many; 4 if left out")] = None,
    rate: Annotated[str, typer.Option(help="with --lab: of each link, 200mbit")] = "",
    cpus: Annotated[str, typer.Option(help="with --lab: cores of each host; one, or one a host: 0.5")] = "",
    output: Json = None,
    debug: Debug = False,
) -> None:
    """Strategies of context parallelism, forward and backward: time, bytes, and how much communication is exposed."""
    from armillary.launch.bench.context import measure

    result = measure(repetitions, regime, tokens, heads, strategies, ranks, topology, hosts, rate, cpus)
    _write(output, result)


@bench.command("compose")
def bench_compose(
    repetitions: Repetitions = 9,
    size: Annotated[str, typer.Option(metavar="LIST", help="small, medium")] = "medium",
    plans: Annotated[str, typer.Option(metavar="LIST", help="names of plans; all when left out")] = "",
    growth: Annotated[bool, typer.Option("--growth", help="ours alone as ranks, sequences and width grow")] = False,
    output: Json = None,
    debug: Debug = False,
) -> None:
    """FSDP x TP x PP as a plan, beside the same assembled by hand from torch's pieces."""
    from armillary.launch.bench.compose import measure

    _write(output, measure(repetitions, size, plans, growth))


@bench.command("pipeline")
def bench_pipeline(
    ranks: Annotated[str, typer.Option(metavar="LIST", help="pipeline ranks of the cases")] = "4,8,16",
    effort: Annotated[int, typer.Option(min=1, help="schedules tried for each case")] = 120,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="draw some timelines as a PNG")] = None,
    output: Json = None,
    debug: Debug = False,
) -> None:
    """Pipeline schedules made to measure beside the known ones, simulated: bubbles, memory, distance from the bound."""
    from armillary.launch.bench.pipeline import measure, read_ranks

    _write(output, measure(read_ranks(ranks), effort, picture))


@bench.command("sharding")
def bench_sharding(
    repetitions: Repetitions = 5,
    ranks: Annotated[str, typer.Option(metavar="LIST", help="numbers of processes on this machine")] = "2,4",
    precision: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    output: Json = None,
    debug: Debug = False,
) -> None:
    """Our sharded data parallelism beside DeepSpeed's ZeRO-3 and bare FSDP2: a whole step of the same model."""
    from armillary.launch.bench.sharding import measure

    _write(output, measure(repetitions, ranks, precision))


@bench.command("gpu")
def bench_gpu(
    repetitions: Repetitions = 20,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="tiny sizes on the CPU, nothing measured")] = False,
    only: Annotated[list[str], typer.Option(metavar="SECTION", help="one section; may be repeated")] = [],  # noqa: B006
    output: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="instead of docs/benchmarks/gpu-DEVICE.json")
    ] = None,
    debug: Debug = False,
) -> None:
    """All kernels on one CUDA card, in under nine minutes: exactness, speed, peers, other block sizes."""
    from armillary.launch.bench_gpu.run import failed, measure

    raise typer.Exit(FAILED if failed(measure(repetitions, output, dry_run, only)) else 0)


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        from armillary.train.checkpoint.store import write_aside

        write_aside(path, json.dumps(result, indent=2).encode() + b"\n")


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
    leave(run())
