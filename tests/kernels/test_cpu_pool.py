"""The threads that run programs (pool.c): right results however late a thread comes, and no wait without an end.

The pool is built with two operations of this file's own, before which a thread may be made to sleep: where a busy
machine stops one only now and then, here that happens all the time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from engine.kernels import cpu
from tests.helpers.c_operations import write_sources

pytestmark = pytest.mark.process

SIGNATURES = """
SIGNATURE(late_add,
    WRITES(float, x)          // [M, H]: x += delta
    READS(float, delta)       // [M, H]
    INTEGER(size)             // H
    INTEGER(nanoseconds)
)

SIGNATURE(late_gather,
    READS(float, x)           // [T, H]
    READS(int32_t, indices)   // [M]
    INTEGER(size)             // H
    WRITES(float, output)     // [M, H]
    INTEGER(nanoseconds)
)
"""

BODIES = """
#include <time.h>

// One in 20 threads comes late, after what it looks at has been overwritten perhaps.
static void dawdle(int64_t nanoseconds) {
    const struct timespec duration = {0, nanoseconds};
    if (nanoseconds != 0 && rand() % 20 == 0) nanosleep(&duration, NULL);
}

OPERATION(late_add) {
    dawdle(args->nanoseconds);
    const int64_t rows = count(args->num_rows), size = args->size;
    FOR_ROWS(m, rows)
        for (int64_t i = m * size; i < (m + 1) * size; i++) args->x[i] += args->delta[i];
}

OPERATION(late_gather) {
    dawdle(args->nanoseconds);
    const int64_t rows = count(args->num_rows), size = args->size;
    FOR_ROWS(m, rows)
        memcpy(args->output + m * size, args->x + args->indices[m] * size, (size_t)size * sizeof(float));
}
"""

ROWS, SIZE, ROUNDS = 64, 4, 10


class Shuffle:
    """A program whose operations each read what all threads of the one before have written."""

    def __init__(self, num_threads: int, nanoseconds: int) -> None:
        self.num_rows = torch.zeros(1, dtype=torch.int64)
        self.order = torch.randperm(ROWS).int()
        self.x, self.y, self.one = (
            torch.randn(ROWS, SIZE).round(),
            torch.zeros(ROWS, SIZE),
            torch.ones(ROWS, SIZE),
        )
        self.expected = [self.x.clone(), self.y.clone()]
        self.program = cpu.Program(num_threads)
        for _ in range(ROUNDS):
            self._add("late_gather", nanoseconds, x=self.x, indices=self.order, output=self.y)
            self._add("late_add", nanoseconds, x=self.y, delta=self.one)
            self._add("late_gather", nanoseconds, x=self.y, indices=self.order, output=self.x)

    def _add(self, name: str, nanoseconds: int, **tensors: torch.Tensor) -> None:
        self.program.add(name, self.num_rows, size=SIZE, nanoseconds=nanoseconds, **tensors)

    def run(self, rows: int) -> None:
        self.num_rows[0] = rows
        self.program.run()
        x, y = self.expected
        for _ in range(ROUNDS):
            y[:rows] = x[self.order[:rows].long()]
            y[:rows] += 1
            x[:rows] = y[self.order[:rows].long()]
        assert torch.equal(self.x, x)
        assert torch.equal(self.y, y)


def check_pool(directory: Path, nanoseconds: int, seconds: float) -> None:
    """Runs programs for so long, with more threads than cores."""
    cpu.SOURCES[:], cpu.HEADERS[:] = write_sources(directory, SIGNATURES, BODIES)
    torch.manual_seed(0)
    lasting = Shuffle(5, nanoseconds)
    end = time.monotonic() + seconds
    num_runs = 0
    while time.monotonic() < end or num_runs < 20:
        # Runs on end: a thread that is late for one meets the numbers of the next.
        for rows in torch.randint(0, ROWS + 1, (5,)).tolist():
            lasting.run(rows)
        Shuffle(5 - num_runs % 5, nanoseconds).run(ROWS - rows)  # destroyed at once
        Shuffle(5, nanoseconds)  # and without a run
        num_runs += 1
    thread = threading.Thread(target=lasting.run, args=(ROWS,))
    thread.start()
    thread.join()
    process = os.fork()
    if process == 0:
        lasting.run(ROWS)
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0
    lasting.run(ROWS)
    check_seconds(lasting.program)


def check_seconds(program: cpu.Program) -> None:
    """What calls took adds up to what the run took, and over runs."""
    spent = torch.zeros(3 * ROUNDS, dtype=torch.float64)
    start = time.perf_counter()
    program.run(spent)
    assert 0 < spent.sum() <= time.perf_counter() - start
    assert (spent >= 0).all()
    before = spent.clone()
    program.run(spent)
    assert (spent > before).all()
    assert spent.sum() <= time.perf_counter() - start


@pytest.mark.parametrize(
    ("nanoseconds", "is_busy"), [(200_000, False), (0, True)], ids=["late", "beside others"]
)
def test_programs_on_more_threads_than_cores(tmp_path: Path, nanoseconds: int, is_busy: bool) -> None:
    if cpu.library() is None:
        pytest.skip("there is no C compiler on this machine")
    num_others = len(os.sched_getaffinity(0)) if is_busy else 0
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_others)]
    try:
        # A wait without an end shows as a timeout.
        subprocess.run(
            [sys.executable, __file__, str(tmp_path), str(nanoseconds)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            timeout=600,
            check=True,
        )
    finally:
        for other in others:
            other.kill()
            other.wait()


if __name__ == "__main__":
    check_pool(Path(sys.argv[1]), int(sys.argv[2]), seconds=1.5)
