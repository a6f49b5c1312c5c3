"""The engine in its own process: streams, aborts, deaths and what is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine import EngineConfig, SamplingParams
from engine.errors import CheckpointError, ConfigError, EngineDeadError, ModelNotFoundError, RequestError
from engine.executor.ranks.limits import Limits
from engine.frontend.async_engine import AsyncEngine

pytestmark = pytest.mark.process

LONG = SamplingParams(max_tokens=2000, temperature=0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def config(small_model: Path) -> EngineConfig:
    return EngineConfig(model=str(small_model), quant="int8", kv_cache_memory="64MiB")


@asynccontextmanager
async def started(config: EngineConfig) -> AsyncIterator[AsyncEngine]:
    others = set(psutil.Process().children())
    engine = AsyncEngine(config)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.shutdown()
        assert set(psutil.Process().children()) <= others


def engine_process() -> psutil.Process:
    """The newest child: other tests' servers may run beside it."""
    return max(psutil.Process().children(), key=lambda child: child.create_time())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 300))


async def collect(engine: AsyncEngine, prompt: str, params: SamplingParams, request_id: str) -> list[int]:
    token_ids = []
    async for output in engine.generate(prompt, params, request_id):
        for sample in output.outputs:
            token_ids += sample.token_ids
    return token_ids


def test_streams_aborts_and_idleness(config: EngineConfig) -> None:
    async def check() -> None:
        async with started(config) as engine:
            alone = await collect(engine, "The capital of France is", SHORT, "alone")
            many = await asyncio.gather(
                *(collect(engine, "The capital of France is", SHORT, f"many {i}") for i in range(5))
            )
            assert [alone] * 5 == many
            assert len(alone) == 6

            # Leaving a stream early frees its blocks.
            stream = engine.generate("Once upon a time", LONG, "left early")
            await anext(stream)
            assert engine.stats.num_requests_running == 1
            await stream.aclose()
            await until(lambda: engine.stats.num_requests_running == 0)
            assert engine.stats.kv_cache_usage_perc == 0.0

            # So does cancelling the task that reads it.
            task = asyncio.create_task(collect(engine, "Once upon a time", LONG, "cancelled"))
            await until(lambda: engine.stats.num_requests_running == 1)
            task.cancel()
            await until(lambda: engine.stats.num_requests_running == 0)

            # Idle means idle.
            child = engine_process()
            before, steps = child.cpu_times(), engine.stats.num_steps
            await asyncio.sleep(2)
            after = child.cpu_times()
            assert (after.user + after.system) - (before.user + before.system) < 0.2
            assert engine.stats.num_steps == steps

            with pytest.raises(RequestError) as raised:
                await collect(engine, "x" * 60000, SHORT, "too long")
            assert raised.value.field == "prompt"

    run(check())


def test_outputs_that_nobody_takes_are_kept_up_to_a_number(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.frontend.async_engine.MAX_UNREAD_OUTPUTS", 20)

    async def check() -> None:
        async with started(config) as engine:
            stream = engine.generate("Once", LONG, "unread")
            await anext(stream)
            await until(lambda: engine.stats.num_steps > 20 and engine.stats.num_requests_running == 0)
            *taken, last = [output async for output in stream]
            assert len(taken) <= 20
            assert "20 outputs unread" in (last.error or "")
            assert last.finished

    run(check())


def test_a_killed_engine_ends_its_streams_with_the_cause(config: EngineConfig) -> None:
    async def check() -> None:
        async with started(config) as engine:
            streams = [asyncio.create_task(collect(engine, "Once", LONG, f"{i}")) for i in range(3)]
            await until(lambda: engine.stats.num_requests_running == 3)
            child = engine_process()
            os.kill(child.pid, signal.SIGKILL)
            results = await asyncio.gather(*streams, return_exceptions=True)
            assert all(isinstance(result, EngineDeadError) for result in results)
            assert "SIGKILL" in str(results[0])
            assert engine.status == "dead"
            assert "SIGKILL" in (engine.error or "")
            with pytest.raises(EngineDeadError, match="SIGKILL"):
                await collect(engine, "Once", SHORT, "after")

    run(check())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "llama", "quant": "none", "kv_cache_memory": "900GiB"}, ConfigError, "do not fit"),
        pytest.param({"max_model_len": 9999}, ConfigError, "8192", marks=pytest.mark.slow),
        ({"model": "/nowhere/at/all"}, ModelNotFoundError, "nowhere"),
    ],
)
def test_a_failed_start_keeps_its_type_and_message(
    options: dict[str, Any], error: type[Exception], message: str, small_model: Path
) -> None:
    async def check() -> None:
        others = set(psutil.Process().children())
        engine = AsyncEngine(EngineConfig(**{"model": str(small_model), **options}))
        try:
            with pytest.raises(error, match=message):
                await engine.start()
            assert engine.status == "dead"
        finally:
            await engine.shutdown()
        assert set(psutil.Process().children()) <= others

    run(check())


def test_a_process_that_cannot_start_is_reported(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends before it could connect."""
    monkeypatch.setattr(sys, "executable", "/bin/false")

    async def check() -> None:
        with pytest.raises(EngineDeadError, match="exited with status 1"):
            await AsyncEngine(config).start()

    run(check())


def test_a_request_right_after_the_engines_death_fails(config: EngineConfig) -> None:
    async def check() -> None:
        async with started(config) as engine:
            engine_process().kill()
            for i in range(3):
                with pytest.raises(EngineDeadError, match="SIGKILL"):
                    await collect(engine, "Once", LONG, f"{i}")

    run(check())


def test_a_download_does_not_keep_the_program(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    timer = threading.Timer(60, released.set)
    timer.start()
    monkeypatch.setattr("engine.frontend.async_engine.resolve_model", lambda model: released.wait())

    async def check() -> None:
        engine = AsyncEngine(config)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.start(), 0.1)
        assert engine.status == "dead"

    asyncio.run(check())
    assert not released.is_set()
    timer.cancel()
    released.set()


def test_a_damaged_model_is_reported_from_either_process(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + bytes(100))

    async def check() -> None:
        engine = AsyncEngine(EngineConfig(model=str(damaged)))
        with pytest.raises(CheckpointError, match="damaged"):
            await engine.start()

    run(check())


def test_the_engine_goes_with_its_parent(tmp_path: Path, small_model: Path) -> None:
    """The parent is killed without a chance to clean up; its child ends by itself."""
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent("""
        import asyncio, psutil, sys
        from engine import EngineConfig
        from engine.frontend.async_engine import AsyncEngine

        async def main():
            engine = AsyncEngine(EngineConfig(model=sys.argv[1], quant="int8", kv_cache_memory="64MiB"))
            await engine.start()
            print(psutil.Process().children()[0].pid, flush=True)
            await asyncio.sleep(600)

        asyncio.run(main())
        """)
    )
    with subprocess.Popen(
        [sys.executable, str(script), str(small_model)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    deadline = time.monotonic() + 60
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert list(tmp_path.iterdir()) == [script]


def test_an_engine_that_gets_no_cpu_is_not_held_to_be_dead(config: EngineConfig) -> None:
    """Others have the CPUs for longer than it may be silent."""

    async def check() -> None:
        engine = AsyncEngine(config, Limits(silence=2.0, task=2.0))
        await engine.start()
        try:
            expected = await collect(engine, "Once", SHORT, "alone")
            stream = asyncio.create_task(collect(engine, "Once upon", LONG, "long"))
            await until(lambda: engine.stats.num_requests_running == 1)
            child = engine_process()
            for thread in child.threads():
                os.sched_setscheduler(thread.id, os.SCHED_IDLE, os.sched_param(0))
            # In its session, or the system may share the CPUs between sessions (sched(7), autogroup).
            assert os.getsid(child.pid) == os.getsid(0)
            assert os.getpgid(child.pid) == child.pid
            hogs = [
                subprocess.Popen([sys.executable, "-c", "while True: pass"])
                for _ in range(4 * len(os.sched_getaffinity(0)))
            ]
            try:
                before = engine.stats.num_steps
                await asyncio.sleep(8)
                assert engine.status == "ready", engine.error
                print(f"{engine.stats.num_steps - before} steps beside {len(hogs)} hogs")
            finally:
                for hog in hogs:
                    hog.kill()
                    hog.wait()
            stream.cancel()
            assert await collect(engine, "Once", SHORT, "after") == expected
            assert engine.stats.starved_seconds > 1
        finally:
            await engine.shutdown()

    run(check())
