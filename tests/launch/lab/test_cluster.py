"""A lab as data: what is read from the command line, the network planned for it, and its control groups' files."""

import itertools
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.launch import cli
from armillary.launch.lab import leftovers as lab_leftovers
from armillary.launch.lab import permission as lab_permission
from armillary.launch.lab.machines import Controllers, find_controllers, limits
from armillary.launch.lab.network import Network, address, next_hop, plan_network
from armillary.launch.lab.run import as_program
from armillary.launch.lab.spec import LabSpec, Level, read_rate, read_spec, show_memory, show_rate


def test_a_spec_is_read_from_text(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    found = read_spec(4, "200mbit", "star", "node:2", "50mbit", "0.5,0.5,0.5,0.25", "2g", 2)
    assert found == LabSpec(
        rates=(200_000_000,) * 4,
        levels=(Level("node", 2, 50_000_000),),
        cpus=(0.5, 0.5, 0.5, 0.25),
        memory=(2 << 30,) * 4,
        ranks_per_host=2,
    )


@given(st.integers(10_000, 100_000_000_000))
def test_a_rate_survives_being_written(rate):
    assert read_rate("--rate", show_rate(rate)) == rate


def test_amounts_of_memory_as_written():
    assert [show_memory(each) for each in (2 << 30, 1536 << 20, 100 << 10)] == ["2g", "1536m", "100k"]


REFUSED = {
    "--hosts 0": "--hosts 0: allowed are 1 to 64",
    "--topology tree": "--topology tree: allowed are star, ring, mesh",
    "--ranks-per-host 0": "--ranks-per-host 0: at least 1",
    "--rate fast": "--rate fast: write a number and kbit, mbit or gbit, for example 200mbit",
    "--rate 1kbit": "--rate 1kbit: allowed are 10kbit to 100gbit",
    "--rate 1mbit,2mbit,3mbit": (
        "--rate 1mbit,2mbit,3mbit: has 3 entries; give one for all hosts, or one for each of 2"
    ),
    "--cpus 0.001": "--cpus 0.001: a host may have 0.05 to 2 cores of this machine, for example 0.5",
    "--cpus 0.5,3": "--cpus 3: a host may have 0.05 to 2 cores of this machine, for example 0.5",
    "--cpus nan": "--cpus nan: a host may have 0.05 to 2 cores of this machine, for example 0.5",
    "--delay 5": "--delay 5: write a number and us, ms or s, for example 5ms",
    "--delay 1us": "--delay 1us: allowed are 100us to 1s",
    "--memory 2": "--memory 2: write a number and k, m or g, for example 2g",
    "--memory 1m": "--memory 1m: a host needs 16m or more to start a process",
    "--slow-rate 1mbit": "--slow-rate 1mbit: is the rate between groups; say which with --levels node:2",
    "--hosts 4 --levels node:2": ("--levels node:2: add the rate between its groups, for example --slow-rate 50mbit"),
    "--hosts 4 --levels node2 --slow-rate 1mbit": (
        "--levels node2: write name:hosts, for example node:2, with a name of at most 8 letters"
    ),
    "--hosts 8 --levels pair:2,node:4 --slow-rate 1mbit": (
        "--slow-rate 1mbit: give one rate for each of the 2 in --levels pair:2,node:4"
    ),
    "--hosts 8 --levels pair:2,node:3 --slow-rate 2mbit,1mbit": (
        "--levels pair:2,node:3: a node of 3 hosts must be a multiple of 2, larger than it and smaller than --hosts 8"
    ),
    "--levels node:2 --slow-rate 1mbit": (
        "--levels node:2: a node of 2 hosts must be a multiple of 1, larger than it and smaller than --hosts 2"
    ),
    "--hosts 8 --levels a:2,a:4 --slow-rate 2mbit,1mbit": "--levels a:2,a:4: the names must differ",
    "--hosts 9 --levels a:2,b:4,c:8 --slow-rate 2mbit": (
        "--levels a:2,b:4,c:8: at most two, for example pair:2,node:4"
    ),
}


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["armillary", "lab", *arguments])
    return cli.run()


@pytest.mark.parametrize("options", REFUSED)
def test_bad_options_are_told(options, monkeypatch, capsys):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert run(monkeypatch, *options.split(), "--", "true") == 2
    assert capsys.readouterr().err == f"error: {REFUSED[options]}\n"


def test_a_script_or_module_is_run_by_this_python_as_with_torchrun():
    assert as_program(["-m", "a.module", "x"]) == [sys.executable, "-m", "a.module", "x"]
    assert as_program(["script.py", "-m"]) == [sys.executable, "script.py", "-m"]
    assert as_program(["sh", "script.py"]) == ["sh", "script.py"]


def test_a_command_that_cannot_run_is_told(monkeypatch, capsys):
    assert run(monkeypatch, "--", "no-such-command") == 2
    assert run(monkeypatch, "--", ".venv/bin/armillary", "parity", "configs/tiny.toml") == 2
    assert run(monkeypatch) == 2
    assert capsys.readouterr().err == (
        "error: no-such-command: there is no such command to run on the hosts\n"
        "error: armillary parity starts its ranks itself, and would on each host; run it outside a lab\n"
        "error: say what to run on each host, after --, for example: armillary lab --hosts 2 -- hostname\n"
    )


def test_where_it_is_not_permitted_it_says_why(monkeypatch, capsys, tmp_path):
    for clean in ([], ["--clean"]):
        with monkeypatch.context() as patch:
            patch.setattr(os, "geteuid", lambda: 1000)
            assert run(patch, *clean, "--", "true") == 2
    with monkeypatch.context() as patch:
        (tmp_path / "true").symlink_to("/bin/true")
        patch.setenv("PATH", str(tmp_path))
        patch.setattr(os, "geteuid", lambda: 0)
        assert run(patch, "--", "true") == 2
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(lab_permission.shutil, "which", lambda name: f"/bin/{name}")
    for version, root in ((1, "/groups/cpuacct"), (2, "/groups")):
        found = Controllers(version, {"freezer": Path(root), "cpuacct": Path(root)}, (Path(root),))
        with monkeypatch.context() as patch:
            patch.setattr(lab_permission, "controllers_here", lambda found=found: found)
            assert run(patch, "--cpus", "0.5", "--memory", "1g", "--", "true") == 2
            assert run(patch, "--", "true") == 2
    with monkeypatch.context() as patch:
        patch.setattr(lab_permission, "DEVICE", "/dev/none")
        assert run(patch, "--delay", "5ms", "--", "true") == 2
    monkeypatch.setattr(lab_permission, "controllers_here", lambda: None)
    assert run(monkeypatch, "--", "true") == 2
    root = "error: a lab needs root, to make network namespaces and control groups: run it with sudo"
    assert capsys.readouterr().err.splitlines() == [
        root,
        root,
        "error: a lab needs ip and tc from the package iproute2: apt-get install iproute2",
        "error: a lab needs control groups for cpu and memory: mount -t cgroup -o cpu none /sys/fs/cgroup/cpu",
        "error: a lab needs to write to /groups/cpuacct; in a container, run it with --privileged",
        "error: a lab needs control groups for cpu and memory: echo +cpu +memory > /groups/cgroup.subtree_control",
        "error: a lab needs to write to /groups; in a container, run it with --privileged",
        "error: a lab with a delay needs /dev/none: modprobe tun; in a container, run it with --device /dev/none",
        "error: a lab needs control groups, and none are mounted: mount -t cgroup2 none /sys/fs/cgroup",
    ]


@st.composite
def specs(draw) -> LabSpec:
    num_hosts = draw(st.integers(1, 12))
    rates = draw(st.lists(st.integers(10**6, 10**9), min_size=num_hosts, max_size=num_hosts))
    sizes = [size for size in (2, 4) if size < num_hosts][: draw(st.integers(0, 2))]
    levels = [Level(f"level{'ab'[depth]}x", size, 10**5) for depth, size in enumerate(sizes)]
    return LabSpec(tuple(rates), draw(st.sampled_from(["star", "ring", "mesh"])), tuple(levels))


def limited(network: Network) -> dict[tuple[str, str], int]:
    """Rate of each interface that a command limits."""
    found = [each for each in network.commands if each[0] == "tc"]
    return {(each[2], each[6]): int(each[each.index("rate") + 1].removesuffix("bit")) for each in found}


@given(specs())
def test_every_link_is_limited_at_both_ends_and_made_once(spec):
    network = plan_network(spec, "armillary-lab-1-2-3")
    ends = [(end.namespace, end.interface) for link in network.links for end in link.ends]
    assert len(set(ends)) == len(ends)
    assert limited(network) == {
        (end.namespace, end.interface): link.rate for link in network.links for end in link.ends
    }
    assert len(network.cables) == len(network.links)
    assert all(len(interface) <= 15 for _, interface in ends)
    assert len({link.name for link in network.links}) == len(network.links)
    assert all(name.startswith("armillary-lab-1-2-3-") for name in network.namespaces)
    made = [command[3] for command in network.setup if command[:3] == ("ip", "netns", "add")]
    assert tuple(made) == network.namespaces


@given(specs())
def test_nothing_is_made_outside_of_the_namespaces(spec):
    network = plan_network(spec, "p")
    for command in (*network.setup, *network.cables, *network.commands):
        if command[:3] == ("ip", "link", "add"):
            named = [after for word, after in itertools.pairwise(command) if word == "netns"]
            assert len(named) == 2
        else:
            assert command[1] == "-n" or command[1:3] in (("netns", "add"), ("netns", "exec"))
            named = [command[2] if command[1] == "-n" else command[3]]
        assert set(named) <= set(network.namespaces)


@pytest.mark.parametrize("num_hosts", range(2, 12))
def test_around_a_ring_goes_the_shorter_way(num_hosts):
    for start in range(num_hosts):
        for target in range(num_hosts):
            at, hops = start, 0
            while at != target:
                at, hops = next_hop("ring", num_hosts, at, target), hops + 1
            assert hops == min((target - start) % num_hosts, (start - target) % num_hosts)


def test_links_of_the_topologies():
    rates = (10**8, 10**8, 10**7, 10**8)
    names = {kind: [each.name for each in plan_network(LabSpec(rates, kind), "p").links] for kind in ("ring", "mesh")}
    assert names["ring"] == ["host0-host1", "host0-host3", "host1-host2", "host2-host3"]
    assert len(names["mesh"]) == 6
    links = {link.name: link.rate for link in plan_network(LabSpec(rates, "mesh"), "p").links}
    assert links["host0-host2"] == 10**7
    assert links["host0-host1"] == 10**8


def test_groups_of_two_levels_hang_below_one_another():
    spec = LabSpec((10**9,) * 8, "star", (Level("pair", 2, 10**8), Level("node", 4, 10**7)))
    network = plan_network(spec, "p")
    above = {command[6]: command[8] for command in network.commands if command[7:8] == ("master",)}
    assert [above[f"p-host{host}"] for host in (0, 1, 2, 7)] == ["b-pair0", "b-pair0", "b-pair1", "b-pair3"]
    assert [above[f"d-pair{pair}"] for pair in range(4)] == ["b-node0", "b-node0", "b-node1", "b-node1"]
    assert [above[f"d-node{node}"] for node in range(2)] == ["b-root", "b-root"]
    assert Counter(link.rate for link in network.links) == {10**9: 8, 10**8: 4, 10**7: 2}
    assert [spec.rate_between(0, other) for other in (1, 2, 4)] == [10**9, 10**8, 10**7]


def test_a_mesh_routes_to_one_address_a_host():
    commands = plan_network(LabSpec((10**6,) * 3, "mesh"), "p").commands
    route = ("route", "add", f"{address(2)}/32", "dev", "to-host2", "src", address(0))
    assert ("ip", "-n", "p-host0", *route) in commands


def test_controllers_are_found_below_the_own_group(tmp_path):
    for name in ("cpu,cpuacct/mine", "memory", "freezer", "unified"):
        (tmp_path / name).mkdir(parents=True)
    mounts = "".join(
        f"cgroup {tmp_path}/{name} cgroup rw,relatime,{name} 0 0\n" for name in ("cpu,cpuacct", "memory", "freezer")
    )
    unified = f"cgroup2 {tmp_path}/unified cgroup2 rw 0 0\n"
    own = "3:cpu,cpuacct:/mine\n2:memory:/of/another/namespace\n1:freezer:/\n0::/\n"
    found = find_controllers(mounts + unified, own)
    assert found is not None
    assert found.version == 1
    assert found.folders["cpu"] == found.folders["cpuacct"] == tmp_path / "cpu,cpuacct/mine"
    assert found.folders["memory"] == tmp_path / "memory"
    (tmp_path / "unified/cgroup.subtree_control").write_text("cpuset cpu io\n")
    second = find_controllers(unified, "0::/user.slice\n")
    assert second is not None
    assert (second.version, set(second.folders)) == (2, {"freezer", "cpuacct", "cpu"})
    assert find_controllers("proc /proc proc rw 0 0\n", own) is None


def test_limits_as_files():
    assert limits(1, 0.25, None) == [
        ("cpu", "cpu.shares", "25600"),
        ("cpu", "cpu.cfs_period_us", "10000"),
        ("cpu", "cpu.cfs_quota_us", "2500"),
    ]
    assert limits(2, 0.05, 1 << 20) == [
        ("cpu", "cpu.weight", "50"),
        ("cpu", "cpu.max", "1000 20000"),
        ("memory", "memory.max", "1048576"),
        ("memory", "memory.swap.max", "0"),
    ]


def test_only_dead_labs_are_dead():
    birth = lab_leftovers.birth(os.getpid())
    assert birth is not None
    mine = f"{lab_leftovers.PREFIX}{os.getpid()}-{birth}-0"
    assert lab_leftovers.dead_lab(f"{mine}-host0") is None
    # The id is of a living process, but that began at another time.
    other = f"{lab_leftovers.PREFIX}{os.getpid()}-{birth + 1}-0"
    assert lab_leftovers.dead_lab(f"{other}-host12") == other
    assert lab_leftovers.dead_lab(f"{lab_leftovers.PREFIX}someone-elses") is None
