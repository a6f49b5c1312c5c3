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

OPERATIONS = """
#include <stdlib.h>
#include <time.h>
#include "kernels.h"

int enable_tiles(void) { return 0; }

// One in 20 threads comes late, after what it looks at has been overwritten perhaps.
static void dawdle(int64_t nanoseconds) {
    const struct timespec duration = {0, nanoseconds};
    if (nanoseconds != 0 && rand() % 20 == 0) nanosleep(&duration, NULL);
}

// rows, x [M, H] float, delta [M, H] float: x += delta; H, nanoseconds
OPERATION(late_add) {
    dawdle(w[4].i);
    const int64_t rows = count(w[0]), size = w[3].i;
    FOR_ROWS(m, rows)
        for (int64_t i = m * size; i < (m + 1) * size; i++) ((float *)w[1].p)[i] += ((const float *)w[2].p)[i];
}

// rows, x [T, H] float, indices [M] int32, H, output [M, H] float, nanoseconds
OPERATION(late_gather) {
    dawdle(w[5].i);
    const int64_t rows = count(w[0]), size = w[3].i;
    FOR_ROWS(m, rows)
        memcpy((float *)w[4].p + m * size, (const float *)w[1].p + ((const int32_t *)w[2].p)[m] * size,
               (size_t)size * sizeof(float));
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
            self.program.add("late_gather", self.num_rows, [self.x, self.order, SIZE, self.y, nanoseconds])
            self.program.add("late_add", self.num_rows, [self.y, self.one, SIZE, nanoseconds])
            self.program.add("late_gather", self.num_rows, [self.y, self.order, SIZE, self.x, nanoseconds])

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
    source = directory / "operations.c"
    source.write_text(OPERATIONS.replace("kernels.h", str(cpu.HEADERS[0])))
    cpu.SOURCES[:] = [*(path for path in cpu.SOURCES if path.name == "pool.c"), source]
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
            timeout=120,
            check=True,
        )
    finally:
        for other in others:
            other.kill()
            other.wait()


if __name__ == "__main__":
    check_pool(Path(sys.argv[1]), int(sys.argv[2]), seconds=1.5)
