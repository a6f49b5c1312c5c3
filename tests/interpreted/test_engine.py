"""The engine on Triton's kernels from end to end: the runner that GPUs have, without what only CUDA has."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.core.engine_core import EngineCore
from engine.core.pooling_params import PoolingParams
from engine.core.request import Request
from engine.errors import ConfigError
from engine.executor.cuda_graphs import graph_sizes
from engine.executor.runner import ModelRunner
from engine.executor.triton_executor import TritonExecutor
from engine.frontend.embedding import embedding_request
from tests.executor.test_embeddings import assert_same, embed, reference_states
from tests.executor.test_overlap import make_core, make_requests, run
from tests.helpers.paged import make_runner, make_sequences, run_chunks
from tests.helpers.prompt_logprobs import assert_scores_equal, prompt_scores, scored_request
from tests.helpers.tiny import TINY_CONFIGS, load_reference, reference_logits, write_checkpoint
from tests.models.test_quantized_models import dequantized, relative_error

CHUNKS = [[26, 1], [7, 12, 1], [2, 1]]
"""Prompts in one chunk and in two, decodes beside them; longer than Gemma's window."""

FAMILIES = ["llama", "smollm2", "mistral", "qwen2-sliding", "qwen3", "gemma3", "llama-biases"]
SAMPLE = ("smollm2", "qwen3", "gemma3", "llama-biases")
"""Groups of three, norms of heads, two windows, biases; the others are slow."""

ONE_LAYER = ("llama", "smollm2", "llama-biases")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("interpreted")
    for name in FAMILIES:
        config = deepcopy(TINY_CONFIGS[name])
        # The interpreter takes a second for a layer: one, or two where there are several kinds or norms of heads.
        config.num_hidden_layers = 1 if name in ONE_LAYER else 2
        if getattr(config, "layer_types", None):
            config.layer_types = (sorted(set(config.layer_types)) * 2)[: config.num_hidden_layers]
        write_checkpoint(directory / name, config)
    return {name: directory / name for name in FAMILIES}


def logits_of(runner: ModelRunner, chunks: list[list[int]]) -> list[dict[int, torch.Tensor]]:
    return run_chunks(runner, make_sequences(320, chunks), chunks)


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.slow) for name in FAMILIES],
)
def test_logits_equal_those_of_transformers(checkpoints: dict[str, Path], family: str) -> None:
    runner = make_runner(checkpoints[family])
    assert isinstance(runner.executor, TritonExecutor)
    reference = load_reference(checkpoints[family])
    for sequence, computed in zip(make_sequences(320, CHUNKS), logits_of(runner, CHUNKS), strict=True):
        expected = reference_logits(reference, sequence)
        for position, logits in computed.items():
            torch.testing.assert_close(logits, expected[position], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("quant", "deterministic"),
    [
        ("int8", False),
        ("int4", True),
        ("int4:rotated", False),
        pytest.param("int4:g128", False, marks=pytest.mark.slow),
    ],
)
def test_quantized_logits_are_those_of_the_dequantized_weights(
    checkpoints: dict[str, Path], quant: str, deterministic: bool
) -> None:
    path = checkpoints["smollm2"]
    runner = make_runner(path, quant=quant, deterministic=deterministic)
    reference, original = dequantized(path, quant), load_reference(path)
    for sequence, computed in zip(make_sequences(320, CHUNKS), logits_of(runner, CHUNKS), strict=True):
        logits = torch.stack(list(computed.values()))
        expected = reference_logits(reference, sequence)[list(computed)]
        # Two int8 terms leave 1 / (2 * 127 * 254) of the largest value of a row; the head has them in each case.
        assert relative_error(logits, expected) < 2e-3
        assert relative_error(reference_logits(original, sequence)[list(computed)], expected) > 8e-3


@pytest.fixture(scope="module")
def with_float_cache(checkpoints: dict[str, Path]) -> list[dict[int, torch.Tensor]]:
    return logits_of(make_runner(checkpoints["llama"], kv_cache_dtype="float32"), CHUNKS)


# Triton's interpreter rounds an fp8 to half where a carry goes into the exponent; test_models.py has 0.15.
@pytest.mark.parametrize(("cache_type", "bound"), [("int8", 0.03), ("int4", 0.4), ("fp8_e4m3", 0.3)])
def test_a_quantized_cache_costs_little(
    checkpoints: dict[str, Path],
    with_float_cache: list[dict[int, torch.Tensor]],
    cache_type: str,
    bound: float,
) -> None:
    rounded = logits_of(make_runner(checkpoints["llama"], kv_cache_dtype=cache_type), CHUNKS)
    for expected, computed in zip(with_float_cache, rounded, strict=True):
        a, b = (torch.stack(list(logits.values())) for logits in (computed, expected))
        assert 0 < relative_error(a, b) < bound


def test_int8_logits_depend_neither_on_chunks_nor_on_company(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["llama"]
    chunked, whole = [[9, 7, 1], [14, 1, 1]], [[16, 1], [16]]
    first, second = (logits_of(make_runner(path, quant="int8"), chunks) for chunks in (chunked, whole))
    for a, b in zip(first, second, strict=True):
        shared = a.keys() & b.keys()
        assert shared
        assert all(torch.equal(a[position], b[position]) for position in shared)


class UncapturedGraphs:
    """The forward passes that CUDA graphs would replay, over the same padded inputs."""

    def __init__(self, executor: TritonExecutor) -> None:
        self.executor = executor
        self.replayed: list[int] = []

    def size_for(self, num_rows: int) -> int | None:
        sizes = graph_sizes(self.executor.limits.max_num_seqs)
        return next((size for size in sizes if size >= num_rows), None)

    def replay(self, size: int) -> torch.Tensor:
        self.replayed.append(size)
        return self.executor.model.logits(self.executor._hidden(self.executor.buffers.padded(size)))


def device_core(path: Path, **options: Any) -> EngineCore:
    core = make_core(path, max_num_batched_tokens=96, **options)
    assert isinstance(core.model.runner.executor, TritonExecutor)
    return core


def shortened(request: Request) -> Request:
    params = request.params
    params = replace(params, max_tokens=min(params.max_tokens or 6, 6), min_tokens=min(params.min_tokens, 4))
    return replace(request, prompt_token_ids=request.prompt_token_ids[:12], params=params)


def test_padding_and_overlap_bring_the_same_tokens(checkpoints: dict[str, Path]) -> None:
    """Penalties, log-probabilities, late stops and draws of every kind, in a batch that changes as it goes."""
    path = checkpoints["llama"]
    requests = [shortened(request) for request in make_requests()[:7]]
    expected = run(device_core(path, overlap=False), requests)
    core = device_core(path, overlap=True)
    graphs = core.model.runner.executor.graphs = UncapturedGraphs(core.model.runner.executor)  # type: ignore[attr-defined, assignment, arg-type]
    assert run(core, requests) == expected
    # Six and seven rows are padded to eight.
    assert set(graphs.replayed) >= {2, 8}
    assert {result[-1][0] for result in expected.values()} == {"stop", "length"}


def test_log_probabilities_of_prompts_are_those_of_the_logits(checkpoints: dict[str, Path]) -> None:
    """In chunks, of which two are a single token each, and in blocks of three rows."""
    path = checkpoints["smollm2"]
    core = make_core(path, max_num_batched_tokens=6, max_num_seqs=3, quant="none")
    core.model.runner.executor.graphs = UncapturedGraphs(core.model.runner.executor)
    first, second = ([(7 * place + start) % 320 for place in range(13)] for start in (1, 2))
    scores = prompt_scores(core, [scored_request("first", first), scored_request("second", second)])
    reference = load_reference(path)
    for name, prompt in (("first", first), ("second", second)):
        assert_scores_equal(scores[name], prompt, reference_logits(reference, prompt))


def test_more_query_heads_than_a_tile_has_rows_are_refused(tmp_path: Path) -> None:
    config = TINY_CONFIGS["llama"].to_dict() | {
        "num_attention_heads": 64,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    write_checkpoint(tmp_path, type(TINY_CONFIGS["llama"])(**config))
    with pytest.raises(ConfigError, match="64 heads share 1"):
        make_runner(tmp_path)


def test_vectors_of_prompts_are_those_of_transformers(checkpoints: dict[str, Path]) -> None:
    """In chunks, beside sequences that draw, whose decodes run in graphs where no vector is asked for."""
    path = checkpoints["llama"]
    core = make_core(path, kv_cache_dtype="float32", max_num_batched_tokens=24)
    executor = core.model.runner.executor
    executor.graphs = UncapturedGraphs(executor)
    prompts = {str(length): [7 * length % 320] * length + [5] for length in (1, 28)}
    requests = [
        embedding_request(f"{pooling}-{name}", prompt, PoolingParams(pooling=pooling))
        for name, prompt in prompts.items()
        for pooling in ("last", "mean")
    ]
    vectors = embed(core, [*make_requests(max_tokens=4, n=1, min_tokens=0)[:2], *requests])
    for name, prompt in prompts.items():
        states = reference_states(path, prompt).double()
        for pooling, expected in (("last", states[-1]), ("mean", states.mean(0))):
            assert np.abs(vectors[f"{pooling}-{name}"] - expected.numpy()).max() < 1e-4


def test_the_bits_of_a_vector_depend_neither_on_chunks_nor_on_company(checkpoints: dict[str, Path]) -> None:
    requests = [embedding_request(p, list(range(7, 26)), PoolingParams(pooling=p)) for p in ("last", "mean")]
    whole, chunked = (
        make_core(checkpoints["llama"], quant="int8", max_num_batched_tokens=size) for size in (64, 13)
    )
    expected = embed(whole, requests[:1]) | embed(whole, requests[1:])
    assert_same(embed(chunked, requests), expected)
