"""What happened in a lab, of each host and each link: as data, and as tables."""

from typing import Any

from armillary.launch.lab.cluster import Lab
from armillary.launch.lab.spec import show_memory, show_rate
from armillary.launch.rows import print_table


def figures(it: Lab, before: dict[str, tuple[int, int]], exit_codes: list[list[int | None]]) -> dict[str, Any]:
    """What a lab's hosts and links have done since their counters were at `before`; exit codes of each host's ranks."""
    moved = {name: (sent[0] - before[name][0], sent[1] - before[name][1]) for name, sent in it.sent().items()}
    spec = it.spec
    hosts: list[dict[str, Any]] = []
    for number, host in enumerate(it.hosts):
        own = [
            moved[link.name][:: 1 if link.hosts[0] == number else -1]
            for link in it.network.links
            if number in link.hosts
        ]
        hosts.append(
            {
                "name": host.name,
                "address": host.address,
                "cpus": spec.cpus[number] if spec.cpus else None,
                "memory": spec.memory[number] if spec.memory else None,
                "exit_codes": exit_codes[number],
                "cpu_seconds": host.machine.cpu_seconds(),
                "memory_kills": host.machine.memory_kills(),
                "sent": sum(pair[0] for pair in own),
                "received": sum(pair[1] for pair in own),
            }
        )
    links = [
        {"name": link.name, "rate": link.rate, "sent": moved[link.name][0], "received": moved[link.name][1]}
        for link in it.network.links
    ]
    shape = {"topology": spec.topology, "ranks_per_host": spec.ranks_per_host, "delay": spec.delay}
    return {**shape, "hosts": hosts, "links": links}


def print_figures(result: dict[str, Any]) -> None:
    """The tables. A link's `sent` is what its first end sent, `received` what came to it."""
    rows = [["host", "cores", "memory", "exit code", "CPU s", "sent MB", "received MB", ""]]
    for host in result["hosts"]:
        codes = ",".join(map(str, host["exit_codes"]))
        note = "its memory limit ended a process" if host["memory_kills"] else ""
        cores = "all" if host["cpus"] is None else f"{host['cpus']:g}"
        memory = "all" if host["memory"] is None else show_memory(host["memory"])
        figures = [f"{host['cpu_seconds']:.2f}", _megabytes(host["sent"]), _megabytes(host["received"])]
        rows.append([host["name"], cores, memory, codes, *figures, note])
    print()
    print_table(rows)
    rows = [["link", "rate", "sent MB", "received MB"]]
    for link in result["links"]:
        rows.append([link["name"], show_rate(link["rate"]), _megabytes(link["sent"]), _megabytes(link["received"])])
    if len(rows) > 1:
        print()
        print_table(rows)
    print(f"\n{result['wall_seconds']:.2f} s, exit code {result['exit_code']}")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3f}"
