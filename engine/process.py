"""What processes of an engine have in common: they end with their parent, and say where they are and what became of
them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from pathlib import Path

PR_SET_PDEATHSIG = 1

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
"""A second's, in which the kernel counts CPU time."""


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


LOOK_SECONDS = 0.2
"""How often a process is looked at: CPU time is counted in hundredths."""


class RestartLimit:
    """How often something is started again that has died.

    Args:
        most: How often at most within `window` seconds.
    """

    def __init__(self, most: int, window: float) -> None:
        self._most, self._window = most, window
        self._deaths: deque[float] = deque()

    def allows_another(self) -> bool:
        """Notes a death, and says whether it may be started again."""
        now = time.monotonic()
        self._deaths.append(now)
        while now - self._deaths[0] > self._window:
            self._deaths.popleft()
        return len(self._deaths) <= self._most


class ProcessClock:
    """Seconds in which a process could have got on, by which to judge one that does not.

    While a thread of it is ready to run, or waits for a disk, only the CPU time counts that the process gets: beside
    busy neighbours, under a quota, and where memory is short, it is not its fault that nothing happens. While all of
    it sleeps or is stopped, time counts as it passes. Without /proc it always does.

    Args:
        process_id: Of the process; None for one that is elsewhere.
        longest: As `RunningClock` takes it: time counts only while the thread that asks runs itself.

    Attributes:
        seconds: As of the last question.
        starved_seconds: Time in which it was ready and got no CPU.
    """

    def __init__(self, process_id: int | None, longest: float) -> None:
        self.seconds = self.starved_seconds = 0.0
        self._directory = None if process_id is None else Path(f"/proc/{process_id}")
        self._clock = RunningClock(longest)
        self._looked = self._cpu_seconds = 0.0
        self._own = process_id == os.getpid()

    def tick(self) -> float:
        before = self._looked
        passed = self._clock.tick() - before
        if passed < LOOK_SECONDS:
            return self.seconds
        self._looked += passed
        is_ready, cpu_seconds = self._look()
        counted = min(passed, max(0.0, cpu_seconds - self._cpu_seconds)) if is_ready else passed
        self._cpu_seconds = cpu_seconds
        self.seconds += counted
        self.starved_seconds += passed - counted
        return self.seconds

    def _look(self) -> tuple[bool, float]:
        """Whether a thread is ready or waits for a disk, and the CPU time of all, the ended ones among them."""
        if self._directory is None:
            return False, 0.0
        asking = threading.get_native_id() if self._own else None
        try:
            _, *numbers = _stat(self._directory)
            tasks = [task for task in (self._directory / "task").iterdir() if int(task.name) != asking]
        except OSError:  # it has ended, or there is no /proc
            return False, 0.0
        is_ready = False
        for task in tasks:
            with contextlib.suppress(OSError):
                is_ready |= _stat(task)[0] in ("R", "D")
        return is_ready, (int(numbers[10]) + int(numbers[11])) / CLOCK_TICKS


def _stat(directory: Path) -> list[str]:
    """What stands behind the name in a process's or a thread's `stat`, its state first (proc_pid_stat(5))."""
    # The name may hold anything, blanks and brackets too.
    return (directory / "stat").read_text().rpartition(")")[2].split()


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
