"""`armillary bench NAME`: the verbs and their options. Each imports what it measures when it runs."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from armillary.launch.options import Debug, Json, Repetitions, write_result
from armillary.train.failure import FAILED


class _Benchmarks(TyperGroup):
    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands:
            known = ", ".join(sorted(self.commands))
            raise ValueError(f"bench {args[0]}: there is no such benchmark; there are: {known}")
        return super().resolve_command(ctx, args)


bench = typer.Typer(help="Measure against peers, on the same work, interleaved in one run.", cls=_Benchmarks)


@bench.command("train")
def bench_train(repetitions: Repetitions = 5, output: Json = None, debug: Debug = False) -> None:
    """A trainer's whole step against a bare loop over the same model and batch."""
    from armillary.launch.bench.train import rows
    from armillary.launch.rows import print_rows, with_facts

    write_result(output, with_facts("train", print_rows(rows(repetitions)), repetitions))


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
    from armillary.launch.rows import print_rows, with_facts

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
        from armillary.launch.bench.attention import rows

        result = with_facts("attention", print_rows(rows(repetitions)), repetitions)
    write_result(output, result)


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
    write_result(output, result)


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

    write_result(output, measure(repetitions, size, plans, growth))


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

    write_result(output, measure(read_ranks(ranks), effort, picture))


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

    write_result(output, measure(repetitions, ranks, precision))


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
