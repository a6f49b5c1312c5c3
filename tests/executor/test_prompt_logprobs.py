"""Log-probabilities of prompts: those of the logits, and the same whatever else runs and however a prompt is cut."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core.engine_core import EngineCore
from engine.core.request import Request, SampledToken
from engine.core.sampling_params import SamplingParams
from engine.kernels import cpu
from tests.executor.test_overlap import make_core
from tests.helpers.prompt_logprobs import assert_scores_equal, prompt_scores, scored_request
from tests.helpers.tiny import TINY_CONFIGS, load_reference, reference_logits, write_checkpoint


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(320), k=length)


PROMPT = prompt_of(90)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("scored")
    for family in ("smollm2", "gemma3"):
        write_checkpoint(directory / family, TINY_CONFIGS[family])
    return {family: directory / family for family in ("smollm2", "gemma3")}


@pytest.mark.parametrize("body", ["C", "torch"])
@pytest.mark.parametrize("family", ["smollm2", "gemma3"])
def test_they_are_those_of_transformers_logits(
    checkpoints: dict[str, Path], family: str, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if body == "torch":
        monkeypatch.setattr("engine.kernels.cpu.library", lambda: None)
    core = make_core(checkpoints[family], quant="none", kv_cache_dtype="float32", max_num_batched_tokens=32)
    scores = prompt_scores(core, [scored_request("a", PROMPT)])["a"]
    assert_scores_equal(scores, PROMPT, reference_logits(load_reference(checkpoints[family]), PROMPT))


def alone(core: EngineCore[Any], prompt: list[int]) -> list[SampledToken]:
    return prompt_scores(core, [scored_request("alone", prompt)])["alone"]


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> list[SampledToken]:
    """PROMPT's scores, alone and in one chunk."""
    return alone(make_core(checkpoints["smollm2"], quant="int8"), PROMPT)


exact = pytest.mark.skipif(cpu.library() is None, reason="torch's operators promise less")


@exact
@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 7, "max_num_seqs": 7},
        {"max_num_seqs": 2},
        {"max_num_batched_tokens": 33, "overlap": True},
        {"enable_prefix_caching": False},
    ],
    ids=["chunks of 7", "2 rows of logits", "overlap", "no prefix cache"],
)
def test_chunks_and_blocks_of_rows_bring_the_same_bits(
    checkpoints: dict[str, Path], expected: list[SampledToken], options: dict[str, Any]
) -> None:
    assert alone(make_core(checkpoints["smollm2"], quant="int8", **options), PROMPT) == expected


@exact
def test_a_forced_decode_brings_the_same_bits(
    checkpoints: dict[str, Path], expected: list[SampledToken]
) -> None:
    """Each token drawn after those before it, because all others are as good as banned."""
    core = make_core(checkpoints["smollm2"], quant="int8")
    for number, score in enumerate(expected[::7]):
        position = 1 + 7 * number
        params = SamplingParams(max_tokens=1, temperature=0, logprobs=3, logit_bias={PROMPT[position]: 100})
        core.add_request(
            Request(
                request_id=str(position), prompt_token_ids=PROMPT[:position], params=params, seed=position
            )
        )
        [token] = [token for output in core.step() for token in output.tokens]
        assert token == score


@exact
def test_company_and_preemption_bring_the_same_bits(
    checkpoints: dict[str, Path], expected: list[SampledToken]
) -> None:
    """Each position once, also where a prompt is computed again; others decode in between."""
    core = make_core(checkpoints["smollm2"], quant="int8", kv_cache_memory="64KiB", max_num_batched_tokens=24)
    company = [
        scored_request(str(seed), prompt_of(20, seed), max_tokens=60, ignore_eos=True, prompt_logprobs=None)
        for seed in range(1, 5)
    ]
    scored = [scored_request(f"scored-{i}", PROMPT, max_tokens=8, ignore_eos=True) for i in range(3)]
    scores = prompt_scores(core, [company[0], scored[0], company[1], scored[1], *company[2:], scored[2]])
    assert core.stats.num_preemptions > 0
    assert scores == {request.request_id: expected for request in scored}


@exact
def test_nothing_is_read_from_the_prefix_cache_and_all_is_left_there(
    checkpoints: dict[str, Path], expected: list[SampledToken]
) -> None:
    core = make_core(checkpoints["smollm2"], quant="int8")
    plain = scored_request("plain", PROMPT, prompt_logprobs=None)
    assert not prompt_scores(core, [plain])
    assert alone(core, PROMPT) == expected
    assert core.stats.prefix_cache_hits == 0
    other = make_core(checkpoints["smollm2"], quant="int8")
    assert alone(other, PROMPT) == expected
    prompt_scores(other, [plain])
    assert other.stats.prefix_cache_hits == 80


@exact
def test_a_prompt_brings_them_once_whatever_its_n(
    checkpoints: dict[str, Path], expected: list[SampledToken]
) -> None:
    core = make_core(checkpoints["smollm2"], quant="int8")
    scores = prompt_scores(core, [scored_request("a", PROMPT, n=3, temperature=1, max_tokens=4)])
    assert scores == {"a": expected}
    assert core.stats.num_scheduled_tokens < 2 * len(PROMPT)


@pytest.mark.parametrize("overlap", [False, True])
def test_without_tokens_a_request_ends_with_its_prompt(checkpoints: dict[str, Path], overlap: bool) -> None:
    """Also one that fills the context, and one of a single token, which has no log-probability."""
    core = make_core(checkpoints["smollm2"], quant="int8", overlap=overlap, max_num_batched_tokens=32)
    prompts = [PROMPT, [5], prompt_of(core.info.max_model_len), PROMPT[:32]]
    for number, prompt in enumerate(prompts):
        core.add_request(scored_request(str(number), prompt, max_tokens=0))
    scored, ended = [0] * 4, {}
    while core.has_work:
        for output in core.step():
            assert not output.tokens
            assert output.request_id not in ended
            if output.prompt_logprobs is not None:
                scored[int(output.request_id)] += len(output.prompt_logprobs.token_ids)
            if output.finish_reason is not None:
                ended[output.request_id] = output.finish_reason
    assert ended == dict.fromkeys("0123", "length")
    assert scored == [len(prompt) - 1 for prompt in prompts]
    assert core.stats.kv_cache_usage_perc == 0


def test_the_head_runs_over_the_prompt_only_where_it_is_asked(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(checkpoints["smollm2"], quant="int8")
    rows: list[int] = []
    executor = core.model.executor.executor
    logits_of = executor._logits_of

    def noting(wanted: Any) -> torch.Tensor:
        rows.append(len(wanted))
        logits: torch.Tensor = logits_of(wanted)
        return logits

    monkeypatch.setattr(executor, "_logits_of", noting)
    prompt_scores(core, [scored_request("plain", PROMPT, prompt_logprobs=None)])
    draws = [] if cpu.library() else [1]
    assert rows == draws
    prompt_scores(core, [scored_request("scored", PROMPT)])
    # Eight rows of logits at a time, as many as there are places in the batch.
    assert rows[len(draws) :] == [*draws, *[8] * 11, 1]


def test_a_prompt_whose_logits_are_not_finite_fails_alone(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(checkpoints["smollm2"], quant="int8")
    executor = core.model.executor.executor
    logits_of = executor._logits_of
    monkeypatch.setattr(executor, "_logits_of", lambda rows: logits_of(rows).fill_(torch.nan))
    core.add_request(scored_request("scored", PROMPT))
    core.add_request(scored_request("plain", prompt_of(20, 1), prompt_logprobs=None))
    outputs = {output.request_id: output for output in core.step()}
    assert "not finite" in str(outputs["scored"].error)
    assert outputs["plain"].error is None
