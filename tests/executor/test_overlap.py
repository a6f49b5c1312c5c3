"""Planning a step while one runs brings the same tokens: penalties, late stops, preemption, failures, aborts."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.core.engine_core import EngineCore
from engine.core.request import EngineOutput, Request
from engine.core.sampling_params import SamplingParams
from engine.executor.start import start_engine
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint

EOS = range(3, 23)
"""So many of 320 tokens that half of the sequences end before their limit."""

PARAMS: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 12},
    {"temperature": 1.0, "max_tokens": 30},
    {"temperature": 1.0, "max_tokens": 30, "repetition_penalty": 1.8, "frequency_penalty": 1.5},
    {"temperature": 1.5, "max_tokens": 25, "min_tokens": 20, "n": 3},
    {"temperature": 1.0, "max_tokens": 20, "ignore_eos": True, "logprobs": 3},
    {"temperature": 1.2, "max_tokens": 1},
    {"temperature": 1.0, "max_tokens": 30, "stop_token_ids": tuple(range(100, 120)), "presence_penalty": 2.0},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("overlap") / "model"
    write_checkpoint(path, TINY_CONFIGS["llama"])
    return path


def make_core(path: Path, **options: Any) -> EngineCore:
    options = {"kv_cache_memory": "4MiB", "num_threads": 1, "max_num_seqs": 8, **options}
    return start_engine(EngineConfig(model=str(path), device="cpu", **options), path, EOS)


def make_requests(**options: Any) -> list[Request]:
    source = random.Random(0)
    return [
        Request(
            request_id=str(index),
            prompt_token_ids=[source.randrange(320) for _ in range(source.randrange(1, 60))],
            params=SamplingParams(**{**PARAMS[index % len(PARAMS)], **options}),
            seed=index,
        )
        for index in range(21)
    ]


def run(core: EngineCore, requests: list[Request]) -> dict[tuple[str, int], list[Any]]:
    """Each sample's tokens with their log-probabilities, then how it ended."""
    results: dict[tuple[str, int], list[Any]] = defaultdict(list)
    for request in requests:
        core.add_request(request)
    while core.has_work:
        for output in core.step():
            _note(results, output)
    return results


def _note(results: dict[tuple[str, int], list[Any]], output: EngineOutput) -> None:
    key = (output.request_id, output.index)
    assert not results[key] or isinstance(results[key][-1], int | tuple), "an output after the end"
    for token in output.tokens:
        results[key].append(token.token_id if token.logprob is None else (token.token_id, token.rank))
    if output.finish_reason is not None:
        results[key].append([output.finish_reason, output.stop_token_id, output.error])


@pytest.mark.parametrize(
    "options", [{}, {"max_num_batched_tokens": 16}, {"kv_cache_memory": "80KiB"}, {"quant": "int8"}]
)
def test_the_same_tokens(checkpoint: Path, options: dict[str, Any]) -> None:
    plain, overlapped = (make_core(checkpoint, overlap=overlap, **options) for overlap in (False, True))
    expected = run(plain, make_requests())
    assert {result[-1][0] for result in expected.values()} == {"stop", "length"}
    assert run(overlapped, make_requests()) == expected
    # Late stops cost rows, never more than one each.
    extra = overlapped.stats.num_scheduled_tokens - plain.stats.num_scheduled_tokens
    assert "kv_cache_memory" in options or extra <= len(expected)
    if "kv_cache_memory" in options:
        assert overlapped.stats.num_preemptions > 0
    for core in (plain, overlapped):
        assert core.stats.kv_cache_usage_perc == 0
        assert core.stats.num_requests_running == core.stats.num_requests_waiting == 0


def test_the_next_step_is_launched_before_the_last_one_is_read(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(checkpoint, overlap=True)
    events: list[str] = []
    for name, method in (("execute", core.model.runner.execute), ("sample", core.model.runner.sample)):
        monkeypatch.setattr(core.model.runner, name, _noting(events, name, method))
    monkeypatch.setattr(core.scheduler, "update", _noting(events, "update", core.scheduler.update))
    core.add_request(make_requests(max_tokens=3, ignore_eos=True, min_tokens=0, n=1)[0])
    while core.has_work:
        core.step()
    assert events == ["execute", "sample", *["execute", "update", "sample"] * 2, "update"]


def _noting(events: list[str], name: str, method: Any) -> Any:
    def call(*arguments: Any) -> Any:
        events.append(name)
        return method(*arguments)

    return call


def test_a_row_that_fails_fails_alone(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(make_core(checkpoint, overlap=False), make_requests())
    core = make_core(checkpoint, overlap=True)
    bad = make_requests()[4].prompt_token_ids
    execute = core.model.runner.execute

    def broken(batch: Any) -> Any:
        if any(row.token_ids == bad[: len(row.token_ids)] and row.start == 0 for row in batch.rows):
            raise RuntimeError("no luck")
        return execute(batch)

    monkeypatch.setattr(core.model.runner, "execute", broken)
    results = run(core, make_requests())
    assert results.pop(("4", 0)) == [["error", None, "RuntimeError in a step; the log has the details"]]
    expected.pop(("4", 0))
    assert results == expected


def test_a_step_that_fails_behind_its_draw_is_drawn_again(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runner then has other tokens than those that were pending when the step was planned."""
    expected = run(make_core(checkpoint, overlap=False), make_requests())
    core = make_core(checkpoint, overlap=True)
    sample = core.model.runner.sample

    def broken(logits: Any, batch: Any, draws: Any) -> Any:
        sampled = sample(logits, batch, draws)
        if len(batch.rows) > 1 and core.stats.num_steps % 3 == 0:
            raise RuntimeError("out of memory")
        return sampled

    monkeypatch.setattr(core.model.runner, "sample", broken)
    assert run(core, make_requests()) == expected


def test_aborting_everything_leaves_nothing_behind(checkpoint: Path) -> None:
    core = make_core(checkpoint, overlap=True)
    for request in make_requests():
        core.add_request(request)
    for _ in range(3):
        core.step()
    for request in make_requests():
        core.abort(request.request_id)
    while core.has_work:
        assert core.step() == []
    assert core.stats.kv_cache_usage_perc == 0
    assert run(core, make_requests()) == run(make_core(checkpoint, overlap=False), make_requests())
