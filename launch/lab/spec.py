"""What a lab should look like: its hosts, the rates of its links, its CPUs and memory, read from text and checked."""

import os
import re
from dataclasses import dataclass

TOPOLOGIES = ("star", "ring", "mesh")
MOST_HOSTS = 64
LEAST_CPUS = 0.05
LEAST_RATE, MOST_RATE = 10_000, 100_000_000_000
LEAST_MEMORY = 16 << 20
RATE_UNITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
DELAY_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
LEAST_DELAY, MOST_DELAY = 1e-4, 1.0
MEMORY_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


@dataclass(frozen=True)
class Level:
    """Groups of `size` neighbouring hosts; `rate` bit/s is what a group has to all that is outside it."""

    name: str
    size: int
    rate: int


@dataclass(frozen=True)
class LabSpec:
    """A lab. Tuples have one entry a host; levels go from the innermost out; bit/s, cores, bytes and seconds."""

    rates: tuple[int, ...]
    topology: str = "star"
    levels: tuple[Level, ...] = ()
    cpus: tuple[float, ...] | None = None
    memory: tuple[int, ...] | None = None
    ranks_per_host: int = 1
    delay: float = 0.0

    @property
    def num_hosts(self) -> int:
        return len(self.rates)

    def rate_between(self, one: int, other: int) -> int:
        """Bit/s of a link that only these two hosts share."""
        rate = min(self.rates[one], self.rates[other])
        for level in self.levels:
            if one // level.size != other // level.size:
                rate = level.rate
        return rate


def read_spec(
    hosts: int,
    rate: str,
    topology: str = "star",
    levels: str = "",
    slow_rate: str = "",
    cpus: str = "",
    memory: str = "",
    ranks_per_host: int = 1,
    delay: str = "",
) -> LabSpec:
    """A spec from the texts of the command line: lists have one entry for all hosts, or one a host.

    Raises:
        ValueError: naming the option, what it is and what is allowed.
    """
    if not 1 <= hosts <= MOST_HOSTS:
        raise ValueError(f"--hosts {hosts}: allowed are 1 to {MOST_HOSTS}")
    if topology not in TOPOLOGIES:
        raise ValueError(f"--topology {topology}: allowed are {', '.join(TOPOLOGIES)}")
    if ranks_per_host < 1:
        raise ValueError(f"--ranks-per-host {ranks_per_host}: at least 1")
    rates = [read_rate("--rate", part) for part in _per_host("--rate", rate, hosts)]
    return LabSpec(
        rates=tuple(rates),
        topology=topology,
        levels=_read_levels(levels, slow_rate, hosts),
        cpus=tuple(_read_cpus(part) for part in _per_host("--cpus", cpus, hosts)) if cpus else None,
        memory=tuple(_read_memory(part) for part in _per_host("--memory", memory, hosts)) if memory else None,
        ranks_per_host=ranks_per_host,
        delay=_read_delay(delay) if delay else 0.0,
    )


def read_rate(option: str, text: str) -> int:
    """Bit/s of "200mbit"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", text)
    if not found:
        raise ValueError(f"{option} {text}: write a number and kbit, mbit or gbit, for example 200mbit")
    rate = round(float(found[1]) * RATE_UNITS[found[2]])
    if not LEAST_RATE <= rate <= MOST_RATE:
        raise ValueError(f"{option} {text}: allowed are {show_rate(LEAST_RATE)} to {show_rate(MOST_RATE)}")
    return rate


def show_rate(rate: int) -> str:
    """The shortest way to write a rate: 200mbit."""
    unit = next(unit for unit in ("gbit", "mbit", "kbit") if rate >= RATE_UNITS[unit] or unit == "kbit")
    return f"{rate / RATE_UNITS[unit]:.12g}{unit}"


def show_memory(memory: int) -> str:
    """The shortest way to write an amount of memory: 2g."""
    unit = next(unit for unit in ("g", "m", "k") if memory % MEMORY_UNITS[unit] == 0 or unit == "k")
    return f"{memory / MEMORY_UNITS[unit]:.10g}{unit}"


def _per_host(option: str, text: str, hosts: int) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) not in (1, hosts):
        raise ValueError(
            f"{option} {text}: has {len(parts)} entries; give one for all hosts, or one for each of {hosts}"
        )
    return parts * hosts if len(parts) == 1 else parts


def _read_cpus(text: str) -> float:
    most = os.cpu_count() or 1
    if not re.fullmatch(r"\d*\.?\d+", text) or not LEAST_CPUS <= float(text) <= most:
        raise ValueError(
            f"--cpus {text}: a host may have {LEAST_CPUS} to {most} cores of this machine, for example 0.5"
        )
    return float(text)


def _read_delay(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s)", text)
    if not found:
        raise ValueError(f"--delay {text}: write a number and us, ms or s, for example 5ms")
    delay = float(found[1]) * DELAY_UNITS[found[2]]
    if not LEAST_DELAY <= delay <= MOST_DELAY:
        raise ValueError(f"--delay {text}: allowed are {LEAST_DELAY * 1e6:g}us to {MOST_DELAY:g}s")
    return delay


def _read_memory(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])", text)
    if not found:
        raise ValueError(f"--memory {text}: write a number and k, m or g, for example 2g")
    memory = int(float(found[1]) * MEMORY_UNITS[found[2]])
    if memory < LEAST_MEMORY:
        raise ValueError(f"--memory {text}: a host needs {show_memory(LEAST_MEMORY)} or more to start a process")
    return memory


def _read_levels(text: str, slow_rate: str, hosts: int) -> tuple[Level, ...]:
    if not text:
        if slow_rate:
            raise ValueError(f"--slow-rate {slow_rate}: is the rate between groups; say which with --levels node:2")
        return ()
    if not slow_rate:
        raise ValueError(f"--levels {text}: add the rate between its groups, for example --slow-rate 50mbit")
    parts = [part.strip() for part in text.split(",")]
    rates = [read_rate("--slow-rate", part.strip()) for part in slow_rate.split(",")]
    if len(parts) > 2:
        raise ValueError(f"--levels {text}: at most two, for example pair:2,node:4")
    if len(rates) != len(parts):
        raise ValueError(f"--slow-rate {slow_rate}: give one rate for each of the {len(parts)} in --levels {text}")
    levels: list[Level] = []
    for part, rate in zip(parts, rates, strict=True):
        found = re.fullmatch(r"([a-z]{1,8}):(\d{1,3})", part)
        if not found:
            raise ValueError(f"--levels {text}: write name:hosts, for example node:2, with a name of at most 8 letters")
        level = Level(found[1], int(found[2]), rate)
        inner = levels[-1].size if levels else 1
        if not inner < level.size < hosts or level.size % inner:
            raise ValueError(
                f"--levels {text}: a {level.name} of {level.size} hosts must be a multiple of {inner}, larger than it "
                f"and smaller than --hosts {hosts}"
            )
        levels.append(level)
    if len({level.name for level in levels}) < len(levels):
        raise ValueError(f"--levels {text}: the names must differ")
    return tuple(levels)
