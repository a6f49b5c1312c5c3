"""What processes of an engine have in common: they end with their parent, and say where they are and what became of
them."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1


def exit_cause(status: int) -> str:
    """A return code as `subprocess` gives it: "was killed by SIGKILL", "exited with status 1"."""
    if status < 0:
        known = -status in set(signal.Signals)
        return f"was killed by {signal.Signals(-status).name if known else f'signal {-status}'}"
    return f"exited with status {status}"


def machine_name() -> str:
    """A name that processes of one machine share, which reach each other by address and by process id; elsewhere it
    is another one, be it in a container."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    if not boot_id.exists():
        return socket.gethostname()
    namespaces = (str(Path("/proc/self/ns", kind).readlink()) for kind in ("net", "pid"))
    return " ".join((boot_id.read_text().strip(), *namespaces))


def follow_parent() -> None:
    """Has this process end when its parent does, whose end of standard input is closed then.

    A process that is stopped cannot see that: on Linux the kernel kills it, as soon as the thread that started it
    has ended (prctl(2), PR_SET_PDEATHSIG).
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    threading.Thread(target=_exit_at_end_of_input, daemon=True).start()


def _exit_at_end_of_input() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(0)


def whereabouts(thread_id: int) -> list[str]:
    """What a thread of this process is in, innermost first: ["group.py:95 in _gather", …]."""
    places = []
    frame = sys._current_frames().get(thread_id)
    while frame is not None:
        code = frame.f_code
        places.append(f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}")
        frame = frame.f_back
    return places


class RunningClock:
    """Seconds in which the thread that asks was running.

    One that was stopped itself, by a debugger or with the whole machine, must not think that others were silent.

    Args:
        longest: Seconds between two questions that count at most.

    Attributes:
        seconds: As of the last question.
    """

    def __init__(self, longest: float) -> None:
        self.seconds = 0.0
        self._longest, self._last = longest, time.monotonic()

    def tick(self) -> float:
        now = time.monotonic()
        self.seconds += min(now - self._last, self._longest)
        self._last = now
        return self.seconds
