"""Another host, a millisecond away: `connect` makes it, for a process that has network namespaces of its own.

    this process's namespace      a namespace between them       the other host's
    near, 198.51.100.1 ────────── near-end ── a process ── far-end ────────── far, 198.51.100.2

The process, `python -m tests.helpers.delayed_link`, passes frames on and takes its time: not every kernel can delay
them itself (netem). Nothing has a name outside, and all of it goes with the processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import select
import socket
import struct
import subprocess
import sys
import time
from array import array
from collections import deque
from pathlib import Path

DELAY_SECONDS = 0.001
"""Each way, at least."""

NEAR, FAR = "198.51.100.1", "198.51.100.2"
"""Of this host and the other; nobody has these addresses, which are for examples."""

ENDS = ("near-end", "far-end")
ALL_PROTOCOLS = 3
LARGEST_FRAME = 2**16

SIOCETHTOOL = 0x8946
ETHTOOL_STXCSUM = 0x17


def connect() -> tuple[str, ...]:
    """Makes the other host and the link to it; to be called once.

    Returns:
        What a command begins with that is to run on the other host.
    """
    far, between = _make_namespace(), _make_namespace()
    for name, end in zip(("near", "far"), ENDS, strict=True):
        _run("ip", "link", "add", name, "type", "veth", "peer", end, "netns", between[-1])
        _run(*between, "ip", "link", "set", end, "up")
        _finish_frames(name)
    command = (*between, sys.executable, "-m", "tests.helpers.delayed_link")
    forwarder = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert forwarder.stdout is not None
    assert forwarder.stdout.readline(), "the link has failed"
    _run("ip", "link", "set", "far", "netns", far[-1])
    for enter, name, address in (((), "near", NEAR), (far, "far", FAR)):
        _run(*enter, "ip", "address", "add", f"{address}/24", "dev", name)
        for device in ("lo", name):
            _run(*enter, "ip", "link", "set", device, "up")
    return far


def round_trip() -> float:
    """Seconds until the other host has said that nobody listens at one of its ports."""
    with socket.socket() as probe:
        start = time.monotonic()
        try:
            probe.connect((FAR, 1))
        except ConnectionRefusedError:
            return time.monotonic() - start
    raise AssertionError("somebody listens")


def num_bytes_sent() -> int:
    """Over the link, from this host."""
    (counts,) = re.findall(r"near:(.*)", Path("/proc/net/dev").read_text())
    return int(counts.split()[8])


def _make_namespace() -> tuple[str, ...]:
    """What a command begins with that is to run in a new network namespace; it stays as long as this process."""
    keeper = subprocess.Popen(("unshare", "--net", "cat"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    keeper.stdin.write(b"\n")
    keeper.stdin.flush()
    assert keeper.stdout.readline(), "there is no namespace"  # what answers is in it
    return "nsenter", "--net", "--target", str(keeper.pid)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _finish_frames(name: str) -> None:
    """Has the kernel put checksums into what it sends there, and with them cut it into frames.

    It leaves both to the receiving end of such a link otherwise, which takes them from nobody but the kernel.
    """
    value = array("I", (ETHTOOL_STXCSUM, 0))
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCETHTOOL, struct.pack("16sP", name.encode(), value.buffer_info()[0]))


def pass_on(ends: list[socket.socket]) -> None:
    """Sends what comes in at one end out at the other, later and in the same order."""
    on_the_way: deque[tuple[float, socket.socket, bytes]] = deque()
    while True:
        timeout = max(0.0, on_the_way[0][0] - time.monotonic()) if on_the_way else None
        for end in select.select(ends, [], [], timeout)[0]:
            with contextlib.suppress(OSError):  # the link has gone down
                frame, (_, _, kind, *_) = end.recvfrom(LARGEST_FRAME)
                if kind != socket.PACKET_OUTGOING:
                    on_the_way.append((time.monotonic() + DELAY_SECONDS, ends[end is ends[0]], frame))
        while on_the_way and on_the_way[0][0] <= time.monotonic():
            _, end, frame = on_the_way.popleft()
            with contextlib.suppress(OSError):
                end.send(frame)


def main() -> None:
    ends = []
    for name in ENDS:
        end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)  # hears nothing before it is bound
        end.bind((name, ALL_PROTOCOLS))
        ends.append(end)
    print("ready", flush=True)
    pass_on(ends)


if __name__ == "__main__":
    main()
