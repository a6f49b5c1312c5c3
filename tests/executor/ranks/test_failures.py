"""Ranks that die, hang, disagree or cannot start: who is named, how soon, and what is left behind."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from engine import EngineConfig, SamplingParams
from engine.core.batch import Batch, BatchRow, Draw
from engine.core.engine_core import EngineCore
from engine.core.request import Request
from engine.errors import ConfigError, EngineDeadError, EngineError, RankFailedError
from engine.executor.ranks.agreement import awaited
from engine.executor.ranks.limits import Limits
from engine.executor.ranks.ranks import LeadingRunner, launch
from engine.executor.start import start_engine
from engine.frontend.async_engine import AsyncEngine
from engine.loading.checkpoint import open_checkpoint
from engine.process import RunningClock
from tests.api.conftest import start_server
from tests.helpers.forked_ranks import ForkLauncher
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint

DETECTION_SECONDS = 10.0

OPTIONS: dict[str, Any] = {
    "quant": "int8",
    "device": "cpu",
    "num_threads": 3,
    "max_num_batched_tokens": 48,
    "kv_cache_memory": "20KiB",
    "seed": 1,
}
"""Small steps and a small cache, of 272 tokens on three ranks: prompts come in chunks, sequences are preempted."""

PREFIX = list(range(1000, 1050))
"""Three blocks that prompts have in common."""

PROMPTS = [PREFIX + [2000 + index] * (5 + 9 * index) for index in range(7)]
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=130, temperature=0, ignore_eos=True)


def requests() -> list[Request]:
    """Some greedy and some drawn, with the log-probabilities of what was likely."""
    kinds: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1.0, "top_p": 0.9}]
    return [
        Request(
            request_id=str(index),
            prompt_token_ids=prompt,
            params=SamplingParams(max_tokens=30, logprobs=3, ignore_eos=True, **kinds[index % 2]),
            seed=index,
        )
        for index, prompt in enumerate(PROMPTS)
    ]


def generate(core: EngineCore, aborted: dict[str, int]) -> dict[str, list[Any]]:
    """What each request draws, in company; some are aborted after so many tokens."""
    drawn: dict[str, list[Any]] = defaultdict(list)
    for request in requests():
        core.add_request(request)
    while core.has_work:
        for output in core.step():
            name = output.request_id
            drawn[name] += [(token.token_id, token.logprob, token.top_logprobs) for token in output.tokens]
            if name in aborted and len(drawn[name]) >= aborted[name]:
                core.abort(name)
    return drawn


@pytest.fixture(scope="module")
def options(small_model: Path) -> dict[str, Any]:
    return {**OPTIONS, "model": str(small_model)}


@pytest.fixture(scope="module")
def expected(options: dict[str, Any], small_model: Path) -> list[list[int]]:
    """What one rank draws, greedily, for each prompt by itself."""
    core = start_engine(EngineConfig(**{**options, "kv_cache_memory": "8MiB"}), small_model, ())
    results = []
    for index, prompt in enumerate(PROMPTS[:3]):
        core.add_request(Request(request_id=str(index), prompt_token_ids=prompt, params=GREEDY, seed=0))
        tokens: list[int] = []
        while core.has_work:
            tokens += [token.token_id for output in core.step() for token in output.tokens]
        results.append(tokens)
    return results


@pytest.mark.usefixtures("forked_ranks")
def test_chunks_cached_prefixes_preemptions_and_aborts_do_not_change_what_is_drawn(tmp_path: Path) -> None:
    # Nine heads, so that three ranks share them; of the vocabulary that the prompts are of.
    tiny = deepcopy(TINY_CONFIGS["smollm2"])
    tiny.vocab_size, tiny.intermediate_size = 2100, 96
    write_checkpoint(tmp_path, tiny)
    options = {**OPTIONS, "model": str(tmp_path), "kv_cache_memory": "1MiB"}
    alone = generate(start_engine(EngineConfig(**options), tmp_path, ()), {})
    options["kv_cache_memory"] = "16KiB"
    core = start_engine(EngineConfig(**options, tensor_parallel_size=3), tmp_path, ())
    try:
        together = generate(core, {"2": 4, "5": 9})
        again = generate(core, {"1": 6})
        stats = core.stats
    finally:
        core.close()
    assert stats.num_preemptions > 0
    assert stats.prefix_cache_hits > 0
    for drawn, aborted in ((together, {"2", "5"}), (again, {"1"})):
        for name, tokens in alone.items():
            assert drawn[name] == (tokens[: len(drawn[name])] if name in aborted else tokens)
            assert drawn[name]
    with pytest.raises(EngineDeadError, match="closed"):
        generate(core, {})


@dataclass
class Processes:
    """The processes of an engine that one was started for, rank 0 first, and what they have of the machine."""

    ranks: list[psutil.Process]
    shared_memory: set[str]

    @classmethod
    def of(cls, parent: psutil.Process) -> Processes:
        first = max(parent.children(), key=lambda child: child.create_time())
        ranks = [first, *sorted(first.children(), key=lambda child: child.pid)]
        files = {file.path for rank in ranks for file in rank.memory_maps()}
        return cls(ranks, {path for path in files if path.startswith("/dev/shm/")})

    def check_gone(self) -> None:
        _, left = psutil.wait_procs(self.ranks, timeout=5)
        assert not left
        assert not [path for path in self.shared_memory if Path(path).exists()]


@asynccontextmanager
async def started(**options: Any) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(**options)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.shutdown()


async def collect(engine: AsyncEngine, prompt: list[int], params: SamplingParams, name: str) -> list[int]:
    token_ids: list[int] = []
    async for output in engine.generate(prompt, params, name):
        for sample in output.outputs:
            token_ids += sample.token_ids
    return token_ids


async def collect_on(engine: AsyncEngine, prompt: list[int], params: SamplingParams, name: str) -> None:
    """Asks again and again."""
    for number in count():
        await collect(engine, prompt, params, f"{name}-{number}")


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 300))


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files go; none is left. Its path is short, since that of a socket must be."""
    with tempfile.TemporaryDirectory() as directory:
        monkeypatch.setenv("TMPDIR", directory)
        monkeypatch.setattr("tempfile.tempdir", None)
        yield Path(directory)
        assert list(Path(directory).iterdir()) == []


@pytest.mark.parametrize(
    "blows",
    [
        [(0, signal.SIGKILL), (1, signal.SIGSTOP)],
        pytest.param([(1, signal.SIGKILL), (2, signal.SIGKILL)], marks=pytest.mark.slow),
        pytest.param([(0, signal.SIGSTOP), (2, signal.SIGSTOP)], marks=pytest.mark.slow),
    ],
    ids=["killed and stopped", "killed", "stopped"],
)
def test_a_rank_that_is_struck_under_load_ends_the_engine_and_the_next_one_starts(
    blows: list[tuple[int, signal.Signals]],
    expected: list[list[int]],
    options: dict[str, Any],
    temporary: Path,
) -> None:
    async def check() -> None:
        for rank, number in blows:
            async with started(config=EngineConfig(**options, tensor_parallel_size=3)) as engine:
                alike = [collect(engine, prompt, GREEDY, f"{i}") for i, prompt in enumerate(PROMPTS[:3])]
                assert await asyncio.gather(*alike) == expected
                assert list(temporary.iterdir()) == []
                await strike(engine, rank, number)

    async def strike(engine: AsyncEngine, rank: int, number: signal.Signals) -> None:
        processes = Processes.of(psutil.Process())
        assert len(processes.ranks) == 3
        before = engine.stats.num_preemptions
        streams = [asyncio.create_task(collect_on(engine, p, LONG, f"{i}")) for i, p in enumerate(PROMPTS)]
        await until(lambda: engine.stats.num_requests_running > 3)
        streams.pop().cancel()
        await until(lambda: engine.stats.num_preemptions > before and engine.stats.prefix_cache_hits > 0)
        if rank == 0 and number == signal.SIGKILL:
            # Those that cannot see that rank 0 has gone go, too.
            processes.ranks[2].send_signal(signal.SIGSTOP)
        streams.pop().cancel()
        began = time.monotonic()
        processes.ranks[rank].send_signal(number)
        results = await asyncio.gather(*streams, return_exceptions=True)
        seconds = time.monotonic() - began
        print(f"rank {rank}, {number.name}: {seconds:.2f} s: {engine.error}")
        assert seconds < DETECTION_SECONDS
        cause = "was killed by SIGKILL" if number == signal.SIGKILL else "has been silent for 5 s"
        assert engine.status == "dead"
        assert engine.error is not None
        assert engine.error.startswith(f"rank {rank} {cause} ")
        assert engine.error.split()[-2] == "step"
        assert all(isinstance(error, EngineDeadError) for error in results)
        assert {str(error) for error in results} == {engine.error}
        await asyncio.to_thread(processes.check_gone)

    run(check())


def test_the_log_says_which_rank_has_died_too_often(
    tmp_path: Path, small_model: Path, temporary: Path
) -> None:
    options = ("--model", str(small_model), "--tensor-parallel-size", "3", "--kv-cache-memory", "1MiB")
    options += ("--max-restarts", "0")
    body = {"prompt": PROMPTS[0], "max_tokens": 5000, "ignore_eos": True, "stream": True}
    with start_server(tmp_path, *options) as server:
        server.wait_until_ready()
        processes = Processes.of(psutil.Process(server.process.pid))
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            began = time.monotonic()
            processes.ranks[2].kill()
            *_, error, done = lines
        assert time.monotonic() - began < DETECTION_SECONDS
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_dead"
        assert done == "data: [DONE]"
        assert server.process.wait(60) == 1
        processes.check_gone()
        last = server.log.read_text().strip().splitlines()[-1]
        assert last.startswith("EngineDeadError: rank 2 was killed by SIGKILL at step ")


@pytest.mark.parametrize("act", ["time.sleep(0.01)", "pass"], ids=["sleeps", "spins"])
def test_rank_0_is_missed_when_it_hangs_but_not_by_one_who_was_held_up_itself(
    tmp_path: Path, small_model: Path, temporary: Path, act: str
) -> None:
    """For an engine of one rank, too."""
    script = tmp_path / "stuck.py"
    script.write_text(
        textwrap.dedent("""
        import os, sys, time
        from engine.core import engine_core as core
        from engine.frontend import engine_process
        from engine.executor.ranks.limits import Limits

        step = core.EngineCore.step

        def stuck(self):
            while self.scheduler.num_steps > 20:
                {act}
            return step(self)

        core.EngineCore.step = stuck
        limits = Limits(task=1.0)
        os._exit(engine_process.main(sys.argv[1], sys.argv[2], limits))
        """).replace("{act}", act)
    )
    config = EngineConfig(model=str(small_model), quant="int8", kv_cache_memory="8MiB")

    async def check() -> None:
        limits = Limits(silence=2.5)
        async with started(config=config, limits=limits) as engine:
            processes = Processes.of(psutil.Process())
            time.sleep(4)
            assert len(await collect(engine, PROMPTS[0], GREEDY, "0")) == GREEDY.max_tokens
            began = time.monotonic()
            processes.ranks[0].send_signal(signal.SIGSTOP)
            with pytest.raises(EngineDeadError, match=r"rank 0 has been silent for 2\.5 s after step \d+"):
                await collect(engine, PROMPTS[0], LONG, "1")
            assert time.monotonic() - began < 6
            await asyncio.to_thread(processes.check_gone)
        async with started(config=config, command=(sys.executable, str(script))) as engine:
            processes = Processes.of(psutil.Process())
            pattern = r"rank 0 has not got on for 1 s in step 21 of .* tokens; now at stuck\.py:\d+ in stuck"
            with pytest.raises(EngineDeadError, match=pattern):
                await collect(engine, PROMPTS[0], LONG, "2")
            await asyncio.to_thread(processes.check_gone)

    run(check())


def test_a_clock_does_not_count_what_its_thread_missed() -> None:
    clock = RunningClock(longest=0.05)
    time.sleep(0.5)
    before = time.monotonic()
    assert clock.tick() == pytest.approx(0.05)
    for _ in range(5):
        time.sleep(0.01)
        clock.tick()
    assert 0.1 <= clock.seconds <= 0.05 + time.monotonic() - before


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    config = deepcopy(TINY_CONFIGS["smollm2"])
    config.intermediate_size = 96  # is shared by three, too
    write_checkpoint(path, config)
    return path


def launcher(directory: Path, patch: str) -> ForkLauncher:
    """Ranks that are not quite what they should be."""
    script = directory / "rank.py"
    lines = (
        "import os, sys, time",
        "from engine.errors import ConfigError",
        "from engine.executor.ranks import rank_process, ranks",
        "from engine.executor.runner import ModelRunner",
        textwrap.dedent(patch),
        "sys.exit(rank_process.main(*sys.argv[1:]))",
    )
    script.write_text("\n".join(lines))
    return ForkLauncher(script)


def run_steps(
    tiny: Path, directory: Path, patch: str, num_steps: int = 0, limits: Limits | None = None, stages: int = 1
) -> None:
    """Runs three ranks of one stage, or as many as there are stages; leaves none of them."""
    config = EngineConfig(
        model=str(tiny),
        dtype="float32",
        device="cpu",
        kv_cache_memory="4MiB",
        num_threads=1,
        tensor_parallel_size=3 if stages == 1 else 1,
        pipeline_parallel_size=stages,
    )
    others = set(psutil.Process().children(recursive=True))
    ranks = None
    try:
        _, steps, ranks = launch(config, open_checkpoint(tiny), tiny, limits, launcher(directory, patch))
        assert ranks is not None
        draw = Draw(params=SamplingParams(temperature=0), seed=0, index=0, position=0)
        for position in range(num_steps):
            batch = Batch([BatchRow([5], position, 0, [1, 2], draw)])
            steps.sample(steps.execute(batch), batch, [draw]).read()
        # What the ranks say of the last step is on its way.
        time.sleep(1)
        ranks.check()
    finally:
        if ranks is not None:
            ranks.close()
            ranks.close()
        assert set(psutil.Process().children(recursive=True)) <= others


SAMPLE = """
count, sample = 0, ModelRunner.sample

def strange(self, logits, batch, draws):
    global count
    count += 1
    if self.place.rank == {rank}:
        {act}
    return sample(self, logits, batch, draws)

ModelRunner.sample = strange
"""
"""What one rank does in each step."""


def test_a_rank_that_disagrees_is_named_with_the_step(tiny: Path, tmp_path: Path, temporary: Path) -> None:
    patch = SAMPLE.format(rank=2, act="logits = logits.roll(int(count == 4), dims=-1)")
    with pytest.raises(RankFailedError, match=r"^rank 2 disagrees with the others on what came of step 4$"):
        run_steps(tiny, tmp_path, patch, 6)


def test_a_rank_that_lives_but_stays_in_a_step_is_found_and_a_slow_step_is_not(
    tiny: Path, tmp_path: Path, temporary: Path
) -> None:
    act = "time.sleep(1.5 if count == 3 else 0)\n        while count == 5: pass"
    began = time.monotonic()
    pattern = r"^rank 1 has not finished step 5 of 1 tokens within 3 s; now at rank\.py:\d+ in strange$"
    with pytest.raises(RankFailedError, match=pattern):
        run_steps(tiny, tmp_path, SAMPLE.format(rank=1, act=act), 8, Limits(step=3.0, silence=30.0))
    assert time.monotonic() - began > 4.5


def test_who_waits_is_told_from_who_is_busy_whatever_their_files_are_called(
    tiny: Path, tmp_path: Path, temporary: Path
) -> None:
    """Rank 2 exchanges, in this file's rank.py; rank 1 is busy, in one that is called like that of the groups."""
    (tmp_path / "group.py").write_text("def _gather():\n    while True: pass\n")
    patch = """
    import group
    import torch

    sample = ModelRunner.sample
    count = 0

    def strange(self, logits, batch, draws):
        global count
        count += 1
        if count == 3 and self.place.rank == 1:
            group._gather()
        if count == 3 and self.place.rank == 2:
            with self.place.group.waiting("sum"):
                self.place.group.backend.allreduce([torch.ones(1)]).wait()
        return sample(self, logits, batch, draws)

    ModelRunner.sample = strange
    """
    pattern = r"^rank 1 has not finished step 3 of 1 tokens within 3 s; now at group\.py:2 in _gather$"
    with pytest.raises(RankFailedError, match=pattern):
        run_steps(tiny, tmp_path, patch, 5, Limits(step=3.0, silence=30.0))


@pytest.mark.parametrize(
    ("call", "pattern"),
    [
        (
            "execute",
            r"^rank 0 and 1 and 2 has not finished step 3 of 1 tokens within 3 s; now at .* and .* and .*; "
            r"they wait for each other: rank 0 for 1 and 2 \((sum|gather), \d+\.\d s, after \d+ others\), "
            r"rank 1 for 0 and 2 \((sum|gather), .*\), rank 2 for 0 and 1 \(largest, .*\)$",
        ),
        (
            "sample",
            r"^rank 2 has not finished step 3 of 1 tokens within 3 s; now at group\.py:\d+ in largest; "
            r"it waits in vain: rank 2 for 0 and 1 \(largest, \d+\.\d s, after \d+ others\)$",
        ),
    ],
)
def test_ranks_that_all_wait_are_named_with_what_they_wait_in(
    call: str, pattern: str, tiny: Path, tmp_path: Path, temporary: Path
) -> None:
    """One makes an exchange too many: before the others have finished the step, or after."""
    patch = f"""
    import torch

    call = ModelRunner.{call}
    count = 0

    def strange(self, *arguments):
        global count
        count += 1
        if count == 3 and self.place.rank == 2:
            self.place.group.all_of(True, torch.device("cpu"))
        return call(self, *arguments)

    ModelRunner.{call} = strange
    """
    with pytest.raises(RankFailedError, match=pattern):
        run_steps(tiny, tmp_path, patch, 5, Limits(step=3.0, silence=30.0))


execute = LeadingRunner.execute


def strange(runner: LeadingRunner, batch: Batch) -> torch.Tensor:
    """Has the others begin the third step, and stays behind until they are ended."""
    if batch.rows[0].start == 2:
        runner._ranks.begin(batch)
        while runner._ranks.failure is None:
            pass
        runner._ranks.check()
    return execute(runner, batch)


@pytest.mark.parametrize("culprit", [0, 1])
def test_the_stage_that_the_later_ones_wait_for_is_named(
    culprit: int, tiny: Path, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 2 waits for what rank 1 sends, that for rank 0, and rank 0 for the tokens that rank 2 draws."""
    patch = """
    execute = ModelRunner.execute
    count = 0

    def strange(self, batch):
        global count
        count += 1
        while count == 3 and self.place.rank == 1:
            pass
        return execute(self, batch)
    """
    if culprit == 1:
        patch += "\n    ModelRunner.execute = strange\n"
    else:
        monkeypatch.setattr(LeadingRunner, "execute", strange)
    pattern = (
        rf"^rank {culprit} has not finished step 3 of 1 tokens within 3 s; now at \w+\.py:\d+ in strange$"
    )
    with pytest.raises(RankFailedError, match=pattern):
        run_steps(tiny, tmp_path, patch, 5, Limits(step=3.0, silence=30.0), stages=3)


@pytest.mark.parametrize(
    ("late", "waits_for", "expected"),
    [
        pytest.param(
            [1, 2], {0: (1, 2), 1: (), 2: (0, 1)}, [1], id="one is busy, and the others wait for it"
        ),
        pytest.param([1], {0: (), 1: (), 2: (0, 1)}, [1], id="nobody that is late waits for rank 0"),
        pytest.param([1, 2], {0: (), 1: (0, 2), 2: (0, 1)}, [0], id="rank 0"),
        pytest.param([1, 2], {0: (2,), 1: (0,), 2: (1,)}, [0, 1, 2], id="all for each other"),
        pytest.param(
            [2, 3], {0: (1,), 1: (0,), 2: (1,), 3: (2,)}, [0, 1], id="a circle, and who waits for it"
        ),
        pytest.param([1, 3], {0: (), 1: (0,), 2: (3,), 3: (2,)}, [0, 2, 3], id="one, and elsewhere a circle"),
        pytest.param([1, 2], {0: (1,), 1: (2,), 2: (0, 3), 3: ()}, [3], id="a circle that waits for one"),
        pytest.param([2], {1: (2,), 2: (0, 1)}, [1, 2], id="rank 0 is through with the step"),
        pytest.param([], {0: (), 1: (0,)}, [], id="nobody is late"),
    ],
)
def test_who_waits_is_followed_to_those_that_all_wait_for(
    late: list[int], waits_for: dict[int, tuple[int, ...]], expected: list[int]
) -> None:
    assert awaited(late, waits_for) == expected


@pytest.mark.parametrize("context", ["", "with self.place.group.waiting('sum'): "])
def test_what_a_rank_fails_with_in_a_step_is_told(
    context: str, tiny: Path, tmp_path: Path, temporary: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And where, if it is not an exchange: that fails where the fault is another rank's."""
    act = f"if count == 2:\n            {context}raise MemoryError('3 GiB')"
    with pytest.raises(RankFailedError, match=r"^rank 1 failed at step 2: MemoryError: 3 GiB$"):
        run_steps(tiny, tmp_path, SAMPLE.format(rank=1, act=act), 4)
    assert ("in strange" in capfd.readouterr().err) == (context == "")


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        ("raise ConfigError('no such option here')", ConfigError, "^rank 2: no such option here$"),
        pytest.param(
            "raise MemoryError('3 GiB')",
            RankFailedError,
            "^rank 2 failed while it started: MemoryError: 3 GiB$",
            marks=pytest.mark.slow,
        ),
        ("os._exit(7)", RankFailedError, "^rank 2 exited with status 7 while it started$"),
    ],
)
def test_a_rank_that_cannot_start_says_why(
    act: str, error: type[EngineError], message: str, tiny: Path, tmp_path: Path, temporary: Path
) -> None:
    """While the others wait for it where they meet."""
    patch = f"""
    start = ModelRunner.__init__

    def strange(self, config, checkpoint, rank, *others, **options):
        if rank == 2:
            {act}
        start(self, config, checkpoint, rank, *others, **options)

    ModelRunner.__init__ = strange
    """
    began = time.monotonic()
    with pytest.raises(error, match=message):
        run_steps(tiny, tmp_path, patch)
    assert time.monotonic() - began < Limits().start


def test_a_program_that_is_interrupted_or_ends_without_closing_leaves_nothing(
    options: dict[str, Any], temporary: Path
) -> None:
    options = {**options, "tensor_parallel_size": 3, "kv_cache_memory": "1MiB"}
    program = f"""
    import signal, sys, psutil
    from engine import LLM, SamplingParams
    # Who starts tests in the background of a shell has them ignore interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    llm = LLM(**{options!r})
    print(*[child.pid for child in psutil.Process().children()], flush=True)
    try:
        llm.generate([{PREFIX}] * 4, SamplingParams(max_tokens=3000, ignore_eos=True), use_tqdm=False)
    except KeyboardInterrupt:
        sys.exit(130)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        ranks = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        assert len(ranks) == 2
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    _, left = psutil.wait_procs(ranks, timeout=5)
    assert not left
