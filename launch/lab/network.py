"""The network of a lab as data: namespaces, links between them, and the `ip` and `tc` commands that make them."""

from dataclasses import dataclass

from armillary.launch.lab.spec import LabSpec

INTERFACE = "eth0"
"""The interface of every host that holds its one address."""
BURST_SECONDS, LEAST_BURST = 0.001, 125_000
QUEUE = "400ms"
SETTINGS = {
    # The machine's own choice may be BBR, which scatters by 10 % behind a token bucket; reno by 0.5 %.
    "/proc/sys/net/ipv4/tcp_congestion_control": "reno",
    "/proc/sys/net/ipv4/ip_forward": "1",
    # Of two ways of one length around a ring, the one back may be the other.
    "/proc/sys/net/ipv4/conf/all/rp_filter": "0",
    "/proc/sys/net/ipv4/conf/default/rp_filter": "0",
    # Its chatter would be in the counters.
    "/proc/sys/net/ipv6/conf/all/disable_ipv6": "1",
    "/proc/sys/net/ipv6/conf/default/disable_ipv6": "1",
}

Command = tuple[str, ...]


@dataclass(frozen=True)
class End:
    """One end of a link."""

    namespace: str
    interface: str


@dataclass(frozen=True)
class Link:
    """A pair of interfaces, limited to `rate` bit/s each way. `hosts`: those at its ends, in their order."""

    name: str
    ends: tuple[End, End]
    rate: int
    hosts: tuple[int, ...]


@dataclass(frozen=True)
class Network:
    """All that has to be made. `hosts` are the namespaces of the hosts, `namespaces` these and the switch's; `cables`
    are the commands that make both ends of all links, unless links have a delay: see lab/delay.py."""

    namespaces: tuple[str, ...]
    hosts: tuple[str, ...]
    links: tuple[Link, ...]
    setup: tuple[Command, ...]
    cables: tuple[Command, ...]
    commands: tuple[Command, ...]


def address(host: int) -> str:
    return f"10.77.0.{host + 1}"


def host_name(host: int) -> str:
    return f"host{host}"


def plan_network(spec: LabSpec, prefix: str) -> Network:
    """The network of a spec. All names of namespaces start with `prefix`; interfaces exist in namespaces only."""
    hosts = tuple(f"{prefix}-{host_name(host)}" for host in range(spec.num_hosts))
    if spec.topology == "star":
        switch = f"{prefix}-switch"
        namespaces, links, commands = (*hosts, switch), *_star(spec, hosts, switch)
    else:
        namespaces, links, commands = hosts, *_pairs(spec, hosts)
    setup = [command for namespace in namespaces for command in _namespace(namespace)]
    cables = [_veth(link) for link in links]
    return Network(namespaces, hosts, tuple(links), tuple(setup), tuple(cables), tuple(commands))


def _namespace(name: str) -> list[Command]:
    writes = "; ".join(f"[ ! -e {file} ] || echo {text} > {file}" for file, text in SETTINGS.items())
    return [
        ("ip", "netns", "add", name),
        ("ip", "netns", "exec", name, "sh", "-ec", writes),
        ("ip", "-n", name, "link", "set", "dev", "lo", "up"),
    ]


def _veth(link: Link) -> Command:
    one, other = link.ends
    pair = ("ip", "link", "add", "name", one.interface, "netns", one.namespace, "type", "veth")
    return (*pair, "peer", "name", other.interface, "netns", other.namespace)


def _limit(link: Link) -> list[Command]:
    """Both ends of a link up, and each limited in what it sends, so that the link is limited both ways."""
    commands: list[Command] = []
    for end in link.ends:
        commands.append(("ip", "-n", end.namespace, "link", "set", "dev", end.interface, "up"))
        commands.append(limit(end, link.rate))
    return commands


def limit(end: End, rate: int) -> Command:
    """A token bucket. Its burst holds a whole offloaded segment of 64 KiB, or they would be cut up at great cost."""
    burst = max(LEAST_BURST, round(rate / 8 * BURST_SECONDS))
    bucket = ("tbf", "rate", f"{rate}bit", "burst", str(burst), "latency", QUEUE)
    return ("tc", "-n", end.namespace, "qdisc", "add", "dev", end.interface, "root", *bucket)


def _star(spec: LabSpec, hosts: tuple[str, ...], switch: str) -> tuple[list[Link], list[Command]]:
    """A port a host at its group's bridge, and an uplink a group to the bridge of the level above, up to the root."""
    sizes = [level.size for level in spec.levels]
    bridges = ["b-root"]
    links, commands = [], []
    for host, namespace in enumerate(hosts):
        ends = (End(namespace, INTERFACE), End(switch, f"p-{host_name(host)}"))
        links.append(Link(f"{host_name(host)}-switch", ends, spec.rates[host], (host,)))
        above = f"b-{spec.levels[0].name}{host // sizes[0]}" if sizes else "b-root"
        commands += _limit(links[-1])
        commands.append(("ip", "-n", namespace, "address", "add", f"{address(host)}/24", "dev", INTERFACE))
        commands.append(("ip", "-n", switch, "link", "set", "dev", f"p-{host_name(host)}", "master", above))
    for depth, level in enumerate(spec.levels):
        for group in range(-(-spec.num_hosts // level.size)):
            name = f"{level.name}{group}"
            bridges.append(f"b-{name}")
            links.append(Link(f"{name}-switch", (End(switch, f"u-{name}"), End(switch, f"d-{name}")), level.rate, ()))
            outer = spec.levels[depth + 1] if depth + 1 < len(spec.levels) else None
            above = f"b-{outer.name}{group * level.size // outer.size}" if outer else "b-root"
            commands += _limit(links[-1])
            commands.append(("ip", "-n", switch, "link", "set", "dev", f"u-{name}", "master", f"b-{name}"))
            commands.append(("ip", "-n", switch, "link", "set", "dev", f"d-{name}", "master", above))
    made = [command for bridge in bridges for command in _bridge(switch, bridge)]
    return links, [*made, *commands]


def _bridge(namespace: str, name: str) -> list[Command]:
    return [
        (
            "ip",
            "-n",
            namespace,
            "link",
            "add",
            "name",
            name,
            "type",
            "bridge",
            "forward_delay",
            "0",
            "mcast_snooping",
            "0",
        ),
        ("ip", "-n", namespace, "link", "set", "dev", name, "up"),
    ]


def _pairs(spec: LabSpec, hosts: tuple[str, ...]) -> tuple[list[Link], list[Command]]:
    """A link of its own for each pair that has one. A host's address is on a bridge without ports, not on a link, so
    that all its links lead to the one address that gloo binds to."""
    num = spec.num_hosts
    links, commands = [], []
    for host, namespace in enumerate(hosts):
        commands += _bridge(namespace, INTERFACE)
        commands.append(("ip", "-n", namespace, "address", "add", f"{address(host)}/32", "dev", INTERFACE))
    for one in range(num):
        for other in range(one + 1, num):
            if spec.topology == "ring" and other - one not in (1, num - 1):
                continue
            ends = (End(hosts[one], f"to-{host_name(other)}"), End(hosts[other], f"to-{host_name(one)}"))
            name = f"{host_name(one)}-{host_name(other)}"
            links.append(Link(name, ends, spec.rate_between(one, other), (one, other)))
            commands += _limit(links[-1])
    for host, namespace in enumerate(hosts):
        for target in range(num):
            if target != host:
                hop = next_hop(spec.topology, num, host, target)
                through = () if hop == target else ("via", address(hop))
                route = ("route", "add", f"{address(target)}/32", *through, "dev", f"to-{host_name(hop)}")
                onlink = ("onlink",) if through else ()
                commands.append(("ip", "-n", namespace, *route, *onlink, "src", address(host)))
    return links, commands


def next_hop(topology: str, num_hosts: int, host: int, target: int) -> int:
    """The neighbour to which a host hands what is for `target`: around a ring the shorter way, upwards if both are."""
    if topology == "mesh":
        return target
    ahead = (target - host) % num_hosts
    return (host + (1 if ahead <= num_hosts - ahead else -1)) % num_hosts
