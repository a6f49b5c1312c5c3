"""An engine's process dies under open requests: they go on, the same to the bit, and what kills it fails alone."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from engine import LLM, EngineConfig, SamplingParams
from engine.core.pooling_params import PoolingParams
from engine.core.structured_outputs import StructuredOutputs
from engine.errors import EngineDeadError, RankFailedError
from engine.executor.ranks.launching import RankHandle
from engine.router.restarting import RestartingEngine
from tests.helpers.forked_ranks import ForkLauncher

pytestmark = pytest.mark.process

MEAN = PoolingParams(pooling="mean")
PROMPT = "Once upon a time, in a village at the edge of a dark forest, there lived"
JSON = {
    "type": "object",
    "properties": {"names": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 8}},
    "required": ["names"],
    "additionalProperties": False,
}
CASES = [
    SamplingParams(max_tokens=150, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=150, temperature=0.9, seed=3, n=3, ignore_eos=True, logprobs=1),
    SamplingParams(max_tokens=150, temperature=0.8, seed=5, repetition_penalty=1.3, min_tokens=140),
    SamplingParams(max_tokens=150, temperature=0.9, seed=9, ignore_eos=True, stop=("zzz",), min_tokens=12),
    SamplingParams(max_tokens=150, temperature=0.9, seed=4, structured_outputs=StructuredOutputs(json=JSON)),
    SamplingParams(max_tokens=150, seed=6, allowed_token_ids=range(40, 60), bad_words=("!", "()", "*+")),
]


@dataclass
class Received:
    """What a client has of each sample."""

    tokens: list[list[int]]
    texts: list[str]
    logprobs: list[list[Any]]
    reasons: list[str | None]
    errors: list[str] = field(default_factory=list)


async def read(engine: RestartingEngine, params: SamplingParams, name: str, prompt: Any = PROMPT) -> Received:
    samples = range(params.n)
    result = Received([[] for _ in samples], [""] * params.n, [[] for _ in samples], [None] * params.n)
    async for output in engine.generate(prompt, params, name):
        if output.error is not None:
            result.errors.append(output.error)
        for sample in output.outputs:
            result.tokens[sample.index] += sample.token_ids
            result.texts[sample.index] += sample.text
            result.logprobs[sample.index] += sample.logprobs or []
            assert result.reasons[sample.index] is None
            result.reasons[sample.index] = sample.finish_reason
    return result


@asynccontextmanager
async def started(
    config: EngineConfig, command: Sequence[str] | None = None
) -> AsyncIterator[RestartingEngine]:
    engine = RestartingEngine(config, command=command)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.shutdown()


def config(model: Path, **options: Any) -> EngineConfig:
    return EngineConfig(model=str(model), quant="int8", kv_cache_memory="64MiB", num_threads=1, **options)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 600))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def kill(engine: RestartingEngine) -> None:
    child = engine._engine._child
    assert child is not None
    os.kill(child.process.pid, signal.SIGKILL)


def test_streams_go_on_the_same_where_the_engine_is_killed_twice(small_model: Path) -> None:
    async def check() -> None:
        async with started(config(small_model)) as engine:
            undisturbed = [await read(engine, params, f"{i}") for i, params in enumerate(CASES)]
            embedding = await engine.embed(list(range(99)), MEAN, "embedding")
            embeddings = []
            streams = [asyncio.create_task(read(engine, params, f"{i}")) for i, params in enumerate(CASES)]
            for num_steps in (40, 20):
                base = engine.stats.num_steps if engine.num_restarts == 0 else 0
                await until(lambda base=base, more=num_steps: engine.stats.num_steps > base + more)
                kill(engine)
                await until(lambda: engine.status == "restarting")
                # Who comes meanwhile waits.
                streams.append(asyncio.create_task(read(engine, CASES[0], f"late {num_steps}")))
                embedded = engine.embed(list(range(99)), MEAN, f"embedding {num_steps}")
                embeddings.append(asyncio.create_task(embedded))
                await until(lambda: engine.status == "ready")
            received = await asyncio.gather(*streams)
            assert received == [*undisturbed, undisturbed[0], undisturbed[0]]
            assert [one.outputs for one in await asyncio.gather(*embeddings)] == [embedding.outputs] * 2
            assert engine.num_restarts == 2

    run(check())


@pytest.mark.parametrize("num_steps", [4, 40], ids=["amid its prompt", "amid its answer"])
def test_salts_and_a_prompts_log_probabilities_outlive_the_engine(small_model: Path, num_steps: int) -> None:
    params = SamplingParams(
        max_tokens=60, temperature=0.9, seed=3, ignore_eos=True, logprobs=1, prompt_logprobs=2
    )
    prompt = [token % 997 for token in range(640)]

    async def ask(
        engine: RestartingEngine, name: str, salt: str
    ) -> tuple[list[int], list[Any], list[Any], int]:
        tokens: list[int] = []
        logprobs: list[Any] = []
        of_prompt = []
        async for output in engine.generate(prompt, params, name, cache_salt=salt):
            num_cached = output.num_cached_tokens
            of_prompt += [] if output.prompt_logprobs is None else [output.prompt_logprobs]
            for sample in output.outputs:
                tokens += sample.token_ids
                logprobs += sample.logprobs or []
        return tokens, logprobs, of_prompt, num_cached

    async def check() -> None:
        # The prompt takes ten steps.
        async with started(config(small_model, max_num_batched_tokens=64)) as engine:
            undisturbed = await ask(engine, "undisturbed", "first")
            [of_prompt] = undisturbed[2]
            assert len(of_prompt) == len(prompt)
            asked = asyncio.create_task(ask(engine, "disturbed", "second"))
            base = engine.stats.num_steps
            await until(lambda: engine.stats.num_steps >= base + num_steps)
            kill(engine)
            # No block of another salt is found: neither answer has any from the cache.
            assert await asked == undisturbed
            assert undisturbed[3] == 0
            assert engine.num_restarts == 1
            # Nor does the new engine find what a request without the salt has left.
            plain = SamplingParams(max_tokens=1)
            for salt, has_blocks in (("", False), ("second", True), ("third", False)):
                outputs = engine.generate(prompt, plain, f"after {salt}", cache_salt=salt)
                assert ([output.num_cached_tokens async for output in outputs][-1] > 0) is has_blocks

    run(check())


def test_a_request_that_kills_the_engine_twice_fails_alone(small_model: Path, tmp_path: Path) -> None:
    script = tmp_path / "dies_at_77.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal, sys
        from engine.core.engine_core import EngineCore
        from engine.frontend import engine_process

        execute = EngineCore._execute

        def fatal(core, batch):
            if any(row.token_ids[-1] == 77 and row.start == 0 for row in batch.rows):
                core.on_plan(core.scheduler)
                os.kill(os.getpid(), signal.SIGKILL)
            return execute(core, batch)

        EngineCore._execute = fatal
        engine_process.main(sys.argv[1], sys.argv[2])
        """)
    )

    async def check() -> None:
        command = (sys.executable, str(script))
        async with started(config(small_model, max_restarts=4), command) as engine:
            undisturbed = await read(engine, CASES[0], "alone")
            stream = asyncio.create_task(read(engine, CASES[0], "beside"))
            base = engine.stats.num_steps
            await until(lambda: engine.stats.num_steps > base + 5)
            guilty = await read(engine, CASES[1], "guilty", [5, 77])
            vector = await engine.embed([5, 77], MEAN, "guilty vector")
            assert "the engine died twice in a step with this request" in str(vector.error)
            assert await stream == undisturbed
            assert guilty.reasons == ["error"] * 3
            [message] = guilty.errors
            assert message == vector.error
            assert engine.num_restarts == 4
            assert engine.status == "ready"

    run(check())


def test_too_many_deaths_end_it_with_the_cause(small_model: Path) -> None:
    async def check() -> None:
        async with started(config(small_model, max_restarts=1)) as engine:
            stream = asyncio.create_task(read(engine, CASES[0], "stream"))
            await until(lambda: engine.stats.num_steps > 3)
            kill(engine)
            await until(lambda: engine.num_restarts == 1)
            kill(engine)
            with pytest.raises(EngineDeadError, match=r"SIGKILL.*1 times within 600 s.*--max-restarts"):
                await stream
            await asyncio.wait_for(engine.failed.wait(), 600)
            assert engine.status == "dead"
            with pytest.raises(EngineDeadError, match="max-restarts"):
                await read(engine, CASES[0], "after")

    run(check())


def test_a_restart_that_fails_anyhow_is_a_death(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        async with started(config(small_model, max_restarts=2)) as engine:
            stream = asyncio.create_task(read(engine, CASES[0], "stream"))
            await until(lambda: engine.stats.num_steps > 3)
            engine._command = ["/nowhere/at/all"]
            restart, told = engine._restart, []

            async def noted() -> None:
                told.append(engine.error)
                await restart()

            monkeypatch.setattr(engine, "_restart", noted)
            kill(engine)
            with pytest.raises(EngineDeadError, match="FileNotFoundError"):
                await stream
            await asyncio.wait_for(engine.failed.wait(), 600)
            # Who asks meanwhile is not told of files.
            assert len(told) == 2
            assert not any("FileNotFoundError" in cause for cause in told)

    run(check())


@pytest.mark.usefixtures("forked_ranks")
def test_an_llm_goes_on_where_it_loses_a_rank(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"model": str(small_model), "quant": "int8", "kv_cache_memory": "16MiB"}
    params = [CASES[0], CASES[1], CASES[4]]
    with LLM(**options) as one:
        expected = one.generate([PROMPT] * 3, params, use_tqdm=False)
    handles = []
    start = ForkLauncher.start

    def start_and_note(*arguments: Any) -> RankHandle:
        handles.append(start(*arguments))
        return handles[-1]

    monkeypatch.setattr(ForkLauncher, "start", start_and_note)
    with LLM(**options, tensor_parallel_size=3, max_restarts=1) as llm:
        first = weakref.ref(llm.core.model.runner.model)
        scheduler = llm.core.scheduler

        def kill_at_20() -> None:
            while scheduler.num_steps < 20:
                time.sleep(0.001)
            handles[1].kill()

        killer = threading.Thread(target=kill_at_20)
        killer.start()
        results = llm.generate([PROMPT] * 3, params, use_tqdm=False)
        killer.join()
        assert llm.core.scheduler is not scheduler
        gc.collect()
        assert first() is None
        assert len(handles) == 4
        assert [result.outputs for result in results] == [result.outputs for result in expected]
        # The second loss is one too many.
        handles[2].kill()
        with pytest.raises(RankFailedError, match="SIGKILL"):
            llm.generate([PROMPT] * 3, params, use_tqdm=False)
    with LLM(**options, tensor_parallel_size=3) as llm:
        llm.close()
        started_before = len(handles)
        with pytest.raises(EngineDeadError, match="closed"):
            llm.generate([PROMPT], params[0], use_tqdm=False)
        assert len(handles) == started_before
