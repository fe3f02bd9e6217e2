"""Whether a lab is permitted here; if not, what is missing, and what to do."""

import os
import shutil
import sys

from armillary.launch.lab.delay import DEVICE
from armillary.launch.lab.leftovers import controllers_here, fails, new_prefix
from armillary.launch.lab.network import End, limit
from armillary.launch.lab.spec import LabSpec


def why_not(spec: LabSpec | None = None) -> str | None:
    """Why there can be no lab (of this kind) here, and what to do, in a sentence; None if there can."""
    if not sys.platform.startswith("linux"):
        return "a lab needs Linux: network namespaces and control groups"
    if os.geteuid() != 0:
        return "a lab needs root, to make network namespaces and control groups: run it with sudo"
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"a lab needs {' and '.join(missing)} from the package iproute2: apt-get install iproute2"
    if spec and spec.delay and not os.access(DEVICE, os.R_OK | os.W_OK):
        return f"a lab with a delay needs {DEVICE}: modprobe tun; in a container, run it with --device {DEVICE}"
    return _no_groups(spec) or _no_network()


def _no_groups(spec: LabSpec | None) -> str | None:
    controllers = controllers_here()
    if controllers is None:
        return "a lab needs control groups, and none are mounted: mount -t cgroup2 none /sys/fs/cgroup"
    wanted = {"cpu": spec is None or spec.cpus, "memory": spec is None or spec.memory}
    missing = [name for name, want in wanted.items() if want and name not in controllers.folders]
    if missing:
        remedy = f"mount -t cgroup -o {missing[0]} none /sys/fs/cgroup/{missing[0]}"
        if controllers.version == 2:
            remedy = f"echo +cpu +memory > {controllers.roots[0] / 'cgroup.subtree_control'}"
        return f"a lab needs control groups for {' and '.join(missing)}: {remedy}"
    closed = [str(root) for root in controllers.roots if not os.access(root, os.W_OK)]
    if closed:
        return f"a lab needs to write to {closed[0]}; in a container, run it with --privileged"
    return None


def _no_network() -> str | None:
    """Tries what a lab's network needs in a namespace of its own."""
    name = f"{new_prefix()}-trial"
    if (told := fails(("ip", "netns", "add", name))) is not None:
        return f"a lab needs network namespaces ({told}); in a container, run it with --privileged"
    try:
        kinds = {
            "bridges": ("ip", "-n", name, "link", "add", "name", "b", "type", "bridge"),
            "veth pairs": ("ip", "-n", name, "link", "add", "name", "v", "type", "veth", "peer", "name", "w"),
            "token buckets": limit(End(name, "v"), 1_000_000),
        }
        for kind, command in kinds.items():
            if (told := fails(command)) is not None:
                module = {"bridges": "bridge", "veth pairs": "veth", "token buckets": "sch_tbf"}[kind]
                return f"a lab needs {kind}, which this kernel refuses ({told}); try modprobe {module}"
    finally:
        fails(("ip", "netns", "delete", name))
    return None
