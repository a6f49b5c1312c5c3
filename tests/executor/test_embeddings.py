"""Vectors of prompts: transformers' hidden states, and the same bits in any company, chunks and schedule."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.core.engine_core import EngineCore
from engine.core.pooling_params import PoolingParams
from engine.core.request import EngineOutput, Request
from engine.executor.cpu_executor import CpuExecutor
from engine.executor.torch_executor import TorchExecutor
from engine.frontend.embedding import embedding_request
from engine.kernels import cpu
from tests.executor.test_overlap import make_core
from tests.executor.test_overlap import make_requests as make_generations
from tests.helpers.tiny import TINY_CONFIGS, load_reference, write_checkpoint

Vectors = dict[str, np.ndarray]

LENGTHS = (1, 2, 15, 16, 17, 33, 60, 60)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embeddings") / "model"
    write_checkpoint(path, TINY_CONFIGS["llama"])
    return path


def make_prompts() -> list[list[int]]:
    source = random.Random(0)
    prompts = [[source.randrange(320) for _ in range(length)] for length in LENGTHS]
    # A prefix of two blocks is shared.
    prompts[-1][:40] = prompts[-2][:40]
    return prompts


def make_requests() -> list[Request]:
    return [
        embedding_request(f"{pooling}-{index}", prompt, PoolingParams(pooling=pooling))
        for pooling in ("last", "mean")
        for index, prompt in enumerate(make_prompts())
    ]


def embed(core: EngineCore[Any], requests: Sequence[Request]) -> Vectors:
    """The vectors of the requests; others may be among them."""
    for request in requests:
        core.add_request(request)
    vectors: Vectors = {}
    while core.has_work:
        for output in core.step():
            assert output.error is None
            if output.state is not None:
                assert output.request_id not in vectors
                assert (output.finish_reason, output.tokens) == ("stop", [])
                vectors[output.request_id] = np.frombuffer(output.state, np.float32)
    assert core.stats.kv_cache_usage_perc == 0
    return vectors


def assert_same(vectors: Vectors, expected: Vectors) -> None:
    assert vectors.keys() == expected.keys()
    for name, vector in expected.items():
        assert np.array_equal(vectors[name], vector), name


@torch.inference_mode()
def reference_states(path: Path, prompt: list[int]) -> torch.Tensor:
    """Hidden states [tokens, hidden] behind the final norm, as transformers computes them."""
    output = load_reference(path)(torch.tensor([prompt]), use_cache=False, output_hidden_states=True)
    return output.hidden_states[-1][0]


def check_against_transformers(core: EngineCore[Any], path: Path) -> None:
    vectors = embed(core, make_requests())
    for index, prompt in enumerate(make_prompts()):
        states = reference_states(path, prompt).double()
        # Both add float32 in orders of their own; the states are of the size of 1.
        for pooling, expected in (("last", states[-1]), ("mean", states.mean(0))):
            assert np.abs(vectors[f"{pooling}-{index}"] - expected.numpy()).max() < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_vectors_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    write_checkpoint(path, TINY_CONFIGS[family])
    core = make_core(path, kv_cache_dtype="float32", max_num_batched_tokens=24)
    assert isinstance(core.model.runner.executor, CpuExecutor)
    check_against_transformers(core, path)


def test_torchs_operators_pool_too(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.VARIABLE, "torch")
    cpu.library.cache_clear()
    try:
        core = make_core(checkpoint, kv_cache_dtype="float32", max_num_batched_tokens=24)
        assert isinstance(core.model.runner.executor, TorchExecutor)
        check_against_transformers(core, checkpoint)
    finally:
        monkeypatch.undo()
        cpu.library.cache_clear()


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Vectors:
    """Each vector by itself, its prompt in one step, without prefix cache."""
    core = make_core(checkpoint, quant="int8", overlap=False, enable_prefix_caching=False)
    vectors: Vectors = {}
    for request in make_requests():
        vectors |= embed(core, [request])
    return vectors


@pytest.mark.parametrize(
    "options",
    [
        {"overlap": False},
        {"overlap": True},
        {"overlap": True, "max_num_batched_tokens": 9},
        {"overlap": False, "kv_cache_memory": "48KiB", "max_num_batched_tokens": 16},
        {"overlap": True, "kv_cache_memory": "48KiB", "max_num_batched_tokens": 16},
    ],
)
def test_the_same_bits_in_company(checkpoint: Path, expected: Vectors, options: dict[str, Any]) -> None:
    core = make_core(checkpoint, quant="int8", **options)
    # Beside requests that draw, whose tokens are what they are without vectors beside them.
    assert_same(embed(core, [*make_generations(), *make_requests()]), expected)
    assert ("kv_cache_memory" in options) == (core.stats.num_preemptions > 0)
    # Once more, over the blocks that are cached by now.
    assert_same(embed(core, make_requests()), expected)


def test_a_last_token_reads_the_cache_and_a_mean_does_not(checkpoint: Path) -> None:
    core = make_core(checkpoint)
    prompt = make_prompts()[-1]
    num_cached = {}

    def note(name: str, pooling: Any) -> EngineOutput:
        core.add_request(embedding_request(name, prompt, PoolingParams(pooling=pooling)))
        outputs = []
        while core.has_work:
            outputs += core.step()
        (output,) = outputs
        num_cached[name] = output.num_cached_tokens
        return output

    note("first", "mean")
    queries = core.stats.prefix_cache_queries
    note("mean", "mean")
    assert core.stats.prefix_cache_queries == queries == 0
    note("last", "last")
    # A mean's blocks can be found by others.
    assert num_cached == {"first": 0, "mean": 0, "last": 48}


def test_tokens_are_what_they_are_without_vectors_beside_them(checkpoint: Path) -> None:
    def tokens(others: list[Request]) -> dict[tuple[str, int], list[int]]:
        core = make_core(checkpoint, quant="int8", max_num_batched_tokens=16)
        drawn: dict[tuple[str, int], list[int]] = {}
        for request in [*make_generations(), *others]:
            core.add_request(request)
        while core.has_work:
            for output in core.step():
                # Others say how far their prompts are.
                if output.tokens:
                    drawn.setdefault((output.request_id, output.index), []).extend(
                        token.token_id for token in output.tokens
                    )
        return drawn

    assert tokens(make_requests()) == tokens([])


def test_a_prompt_may_fill_the_context(checkpoint: Path) -> None:
    core = make_core(checkpoint, max_model_len=32, max_num_batched_tokens=16)
    prompt = make_prompts()[-1][:32]
    requests = [embedding_request(p, prompt, PoolingParams(pooling=p)) for p in ("last", "mean")]
    assert embed(core, requests).keys() == {"last", "mean"}


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_that_fails_is_run_again_row_by_row(
    checkpoint: Path, expected: Vectors, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it fails before its states were taken or after; what a mean has taken in counts once."""
    core = make_core(checkpoint, quant="int8", overlap=overlap, max_num_batched_tokens=16)
    runner = core.model.runner
    for name, step in (("execute", 2), ("sample", 3), ("sample", 5), ("execute", 7)):
        method, count = getattr(runner, name), 0

        def failing(*arguments: Any, method: Any = method, step: int = step) -> Any:
            nonlocal count
            count += 1
            if count == step:
                raise RuntimeError("spoiled")
            return method(*arguments)

        count = 0
        monkeypatch.setattr(runner, name, failing)
        assert_same(embed(core, make_requests()), expected)
        assert count > step
        monkeypatch.setattr(runner, name, method)


def test_states_that_are_not_finite_fail_their_requests_alone(checkpoint: Path) -> None:
    core = make_core(checkpoint)
    prompts = make_prompts()
    embedding = core.model.runner.model.embedding
    spoiled = prompts[2][7]
    prompts[3] = [token for token in prompts[3] if token != spoiled]
    good = [embedding_request(p, prompts[3], PoolingParams(pooling=p)) for p in ("last", "mean")]
    expected = embed(core, good)
    # In panels of 16 rows.
    embedding.table.matmul.weight[spoiled // 16, :, spoiled % 16] = torch.nan
    for pooling in ("last", "mean"):
        core.add_request(embedding_request(f"bad-{pooling}", prompts[2], PoolingParams(pooling=pooling)))
    for request in good:
        core.add_request(request)
    outputs: dict[str, EngineOutput] = {}
    while core.has_work:
        outputs |= {output.request_id: output for output in core.step()}
    for pooling in ("last", "mean"):
        assert "not finite" in str(outputs[f"bad-{pooling}"].error)
        assert outputs[pooling].state == expected[pooling].tobytes()


def test_an_aborted_request_leaves_nothing(checkpoint: Path, expected: Vectors) -> None:
    core = make_core(checkpoint, quant="int8", max_num_batched_tokens=16)
    requests = make_requests()
    for request in requests:
        core.add_request(request)
    for _ in range(3):
        core.step()
    for request in requests:
        core.abort(request.request_id)
    assert_same(embed(core, make_requests()), expected)
