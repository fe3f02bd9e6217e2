"""`armillary bench context`: strategies of context parallelism side by side, on this machine's cores or in a lab."""

import os
from dataclasses import dataclass
from typing import Any

from armillary.launch.bench.context_rank import DTYPE, Work
from armillary.launch.bench.context_rows import PLAIN, print_rows, rows_of
from armillary.launch.bench.on_ranks import figures_of
from armillary.launch.lab.permission import why_not
from armillary.launch.lab.spec import TOPOLOGIES, read_spec
from armillary.launch.rows import with_facts
from armillary.parallel.context.core import STRATEGIES

RANK = "armillary.launch.bench.context_rank"


@dataclass(frozen=True)
class Regime:
    """Sizes that make one side of the work the longer one."""

    tokens: int
    rate: str


REGIMES = {"communication": Regime(512, "100mbit"), "compute": Regime(2048, "200mbit")}


def measure(
    repetitions: int,
    regime: str = "communication",
    tokens: int | None = None,
    heads: str = "8:8,8:1",
    strategies: str = "",
    ranks: int | None = None,
    lab: str = "",
    hosts: int | None = None,
    rate: str = "",
    cpus: str = "",
) -> dict[str, Any]:
    """Runs the benchmark, prints its tables and returns the rows with the facts of the machine.

    Args:
        repetitions: interleaved, after one of warm-up.
        regime: a name of `REGIMES`, for what is left out of `tokens` (of one rank) and `rate`.
        heads: query heads and key heads of each case.
        strategies: names; empty for all. all_gather is always among them.
        ranks: processes on this machine, without a lab.
        lab: topology of a lab with one rank a host; empty for none.
        hosts, rate, cpus: of the lab, see `lab/spec.py's `read_spec``.

    Raises:
        ValueError: for options that do not go together, or where a lab is not permitted.
        RunStopped, RuntimeError: if a rank fails.
    """
    if regime not in REGIMES:
        raise ValueError(f"--regime {regime}: allowed are {', '.join(REGIMES)}")
    _check_where(lab, ranks, hosts, rate, cpus)
    spec = read_spec(hosts or 4, rate or REGIMES[regime].rate, lab, cpus=cpus) if lab else None
    num_ranks = spec.num_hosts if spec else ranks or 4
    work = Work(
        num_ranks=num_ranks,
        tokens=tokens or REGIMES[regime].tokens,
        heads=read_heads(heads),
        strategies=_read_strategies(strategies),
        repetitions=repetitions,
    )
    if spec and (why := why_not(spec)):
        raise ValueError(why)
    # Before the run, so that the commit is the one that runs.
    run_facts, load = with_facts("context", [], repetitions), os.getloadavg()
    figures, facts = figures_of(RANK, num_ranks, work, spec)
    rows = rows_of(work, figures)
    print_rows(work, rows)
    loads = {"before": load, "after": os.getloadavg()}
    where = {
        "link": figures[0]["link"],
        "regime": regime,
        "ranks": num_ranks,
        "tokens": work.tokens,
        "head_dim": work.head_dim,
    }
    return {**run_facts, "rows": rows, **where, "dtype": str(DTYPE), "load": loads, "lab": facts}


def _check_where(lab: str, ranks: int | None, hosts: int | None, rate: str, cpus: str) -> None:
    if lab and lab not in TOPOLOGIES:
        raise ValueError(f"--lab {lab}: allowed are {', '.join(TOPOLOGIES)}")
    if lab and ranks:
        raise ValueError(f"--ranks {ranks}: in a lab each host is a rank; give --hosts")
    given = {"--hosts": hosts, "--rate": rate, "--cpus": cpus}
    for option, value in given.items() if not lab else ():
        if value:
            raise ValueError(f"{option} {value}: describes a lab; add --lab star, mesh or ring")
    if (ranks is not None and ranks < 2) or (hosts is not None and hosts < 2):
        raise ValueError("bench context: one rank has nobody to exchange with; give 2 ranks or hosts, or more")


def read_heads(text: str) -> tuple[tuple[int, int], ...]:
    """Pairs of query heads and key heads: "8:8,8:1".

    Raises:
        ValueError: if a pair is none, or its key heads do not divide its heads.
    """
    pairs = []
    for part in text.split(","):
        first, _, second = part.strip().partition(":")
        if not (first.isdigit() and second.isdigit() and int(second)) or int(first) % int(second) or not int(first):
            raise ValueError(f"--heads {part}: write query heads and key heads that divide them, for example 8:8,8:1")
        pairs.append((int(first), int(second)))
    return tuple(pairs)


def _read_strategies(text: str) -> tuple[str, ...]:
    names = [part.strip() for part in text.split(",")] if text else list(STRATEGIES)
    for name in names:
        if name not in STRATEGIES:
            raise ValueError(f"--strategies {name}: there is no such strategy; there are {', '.join(STRATEGIES)}")
    return tuple(dict.fromkeys([*names, PLAIN]))
