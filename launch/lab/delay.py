"""Links with a delay: a process that hands frames from one end of each link to the other, some time after they came.

Kernels without netem cannot delay; so a link's ends are TAP devices here, and this process is the cable. The kernel
hands over whole segments of up to 64 KiB before they are cut into packets, which makes a frame rare enough for Python.
Run as `python -m armillary.launch.lab.delay`; the first line of its input says what to join; it ends with its input.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import select
import struct
import sys
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

from armillary.launch.lab.network import Link

DEVICE = "/dev/net/tun"
LARGEST = 1 << 17
NICE = -10
# From linux/if_tun.h and linux/sched.h.
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4 = 0x01, 0x02
CLONE_NEWNET = 0x40000000


def order(links: Iterable[Link], delay: float) -> bytes:
    """The first line of this process's input: seconds, and the ends of the links that it is to make and join."""
    ends = [[[end.namespace, end.interface] for end in link.ends] for link in links]
    return json.dumps({"delay": delay, "links": ends}).encode() + b"\n"


def tap(namespace: str, interface: str) -> int:
    """Makes a TAP device in a namespace, for frames with all their offloads; it lives as long as its descriptor."""
    inside = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(inside, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    finally:
        os.close(inside)
    device = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", interface.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    fcntl.ioctl(device, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
    return device


def carry(partners: dict[int, int], delay: float, stop: int) -> None:
    """Hands each frame to the partner of the device that it came from, `delay` seconds later, until `stop` ends."""
    devices = select.epoll()
    for device in partners:
        devices.register(device, select.EPOLLIN)
    # All wait equally long, so those that came first leave first.
    waiting: deque[tuple[float, int, bytes]] = deque()
    while True:
        # The wait of an epoll is in whole milliseconds, that of select is not.
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        sources: list[Any] = [devices, stop]
        ready = select.select(sources, [], [], pause)[0]
        if stop in ready:
            return
        for device, _ in devices.poll(0) if ready else ():
            with contextlib.suppress(BlockingIOError):
                waiting.append((time.monotonic() + delay, partners[device], os.read(device, LARGEST)))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, target, frame = waiting.popleft()
            # A device that is not up yet takes nothing; a cable does not care.
            with contextlib.suppress(OSError):
                os.write(target, frame)


def main() -> None:
    told: dict[str, Any] = json.loads(sys.stdin.readline())
    partners: dict[int, int] = {}
    for one, other in told["links"]:
        ends = tap(*one), tap(*other)
        partners |= {ends[0]: ends[1], ends[1]: ends[0]}
    with contextlib.suppress(OSError):
        os.nice(NICE)
    with contextlib.suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), b"ready\n")
    carry(partners, told["delay"], sys.stdin.fileno())


if __name__ == "__main__":
    main()
