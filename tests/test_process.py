"""Clocks by which processes are judged, with real processes in each state."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from engine.process import LOOK_SECONDS, ProcessClock, RestartLimit

SPIN = "print(flush=True)\nwhile True: pass"
SLEEP = "print(flush=True)\nimport time\ntime.sleep(1000)"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")


@contextmanager
def child(program: str, lowers: bool = False) -> Iterator[int]:
    """A process that runs the program, on the first CPU alone; in the idle class if `lowers`."""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.sched_setaffinity(process.pid, [min(os.sched_getaffinity(0))])
        if lowers:
            os.sched_setscheduler(process.pid, os.SCHED_IDLE, os.sched_param(0))
        try:
            yield process.pid
        finally:
            process.kill()


def watch(process_id: int, seconds: float = 2.0) -> tuple[ProcessClock, float]:
    """Its clock after a while, and the time that has passed on it and beside it."""
    clock = ProcessClock(process_id, 60.0)
    time.sleep(LOOK_SECONDS)
    clock.tick()
    before, began = clock.seconds, time.monotonic()
    starved = clock.starved_seconds
    while time.monotonic() - began < seconds:
        time.sleep(LOOK_SECONDS)
        clock.tick()
    passed = time.monotonic() - began
    clock.seconds -= before
    clock.starved_seconds -= starved
    return clock, passed


def cpu_seconds(process_id: int) -> float:
    times = psutil.Process(process_id).cpu_times()
    return times.user + times.system


def test_time_counts_while_a_process_sleeps_or_is_stopped() -> None:
    with child(SLEEP) as process_id:
        clock, passed = watch(process_id)
        assert clock.seconds == pytest.approx(passed, abs=2 * LOOK_SECONDS)
        os.kill(process_id, signal.SIGSTOP)
        clock, passed = watch(process_id)
        assert clock.seconds == pytest.approx(passed, abs=2 * LOOK_SECONDS)
        assert clock.starved_seconds < LOOK_SECONDS


def test_the_cpu_time_of_a_process_counts_that_spins() -> None:
    with child(SPIN) as process_id:
        before = cpu_seconds(process_id)
        clock, passed = watch(process_id)
        assert clock.seconds == pytest.approx(cpu_seconds(process_id) - before, abs=2 * LOOK_SECONDS)
        assert clock.seconds + clock.starved_seconds == pytest.approx(passed, abs=2 * LOOK_SECONDS)


def test_time_does_not_count_while_others_have_the_cpu() -> None:
    with child(SPIN), child(SPIN, lowers=True) as process_id:
        clock, passed = watch(process_id)
        assert clock.seconds < passed / 2
        assert clock.starved_seconds > passed / 2


def group_with_quota(name: str) -> Path | None:
    """A new group of processes with a tenth of a CPU; None where that is not permitted."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if "cpu" not in controllers.split(",") and number != "0":
            continue
        for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"):
            group = Path(f"{root}{path}", name)
            with suppress(OSError):
                group.mkdir()
                old, new = group / "cpu.cfs_quota_us", group / "cpu.max"
                if old.exists() or new.exists():
                    old.write_text("10000") if old.exists() else new.write_text("10000 100000")
                    return group
                group.rmdir()
    return None


@pytest.fixture
def quota() -> Iterator[Path]:
    group = group_with_quota(f"engine-test-{os.getpid()}")
    if group is None:
        pytest.skip("no group of processes may be given a quota here")
    yield group
    while (group / "cgroup.procs").read_text():
        time.sleep(0.01)
    group.rmdir()


def test_time_does_not_count_while_a_quota_is_used_up(quota: Path) -> None:
    with child(SPIN) as process_id:
        (quota / "cgroup.procs").write_text(str(process_id))
        clock, passed = watch(process_id)
        assert clock.seconds < passed / 2
        assert clock.starved_seconds > passed / 2


def test_a_process_that_is_elsewhere_is_judged_by_the_time_that_passes() -> None:
    clock = ProcessClock(None, 60.0)
    began = time.monotonic()
    time.sleep(2 * LOOK_SECONDS)
    assert 2 * LOOK_SECONDS <= clock.tick() <= time.monotonic() - began + 0.01


def test_deaths_count_within_a_window() -> None:
    limit = RestartLimit(2, 0.05)
    assert [limit.allows_another() for _ in range(3)] == [True, True, False]
    time.sleep(0.06)
    assert limit.allows_another()
