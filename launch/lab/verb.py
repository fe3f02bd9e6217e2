"""`armillary lab`: its options."""

from typing import Annotated

import typer

from armillary.launch.options import Debug, Json, write_result


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
    write_result(output, result)
    raise typer.Exit(result["exit_code"])
