"""Shared layers: the bits of one rank, whatever the number of ranks, the family and the scheme."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine import SamplingParams
from engine.config import EngineConfig
from engine.core.request import Request, SampledToken
from engine.errors import ModelNotFoundError
from engine.executor.ranks.ranks import launch
from engine.executor.runner import ModelRunner
from engine.executor.start import start_engine
from engine.kernels import cpu
from engine.loading.checkpoint import open_checkpoint
from engine.loading.resolve import resolve_model
from engine.models.splits import RowParallelGather, RowParallelIntegerSum
from tests.helpers.forked_ranks import ForkLauncher
from tests.helpers.paged import make_runner, make_sequences, run_chunks
from tests.helpers.sparse import prune_checkpoint
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint

CHUNKS = [[40, 1, 1], [17, 20, 1], [1, 1, 1]]


MIXES = [
    "int8,model.layers.1.*=int8:g32,model.layers.2.*=none",
    "int4,model.layers.1.*=nf4,model.layers.2.*=codebook4",
    "int8:token,model.layers.1.*=int8:two-terms,model.layers.2.*=int8:groups",
    "int4:g0,model.layers.1.*=int8:weight-only,model.layers.2.*=int8:g32:weight-only",
]
"""All schemes, a layer each."""


def options(path: Path, **others: object) -> dict[str, object]:
    common = {"dtype": "float32", "device": "cpu", "kv_cache_memory": "4MiB", "num_threads": 1}
    return {"model": str(path), **common, **others}


@contextmanager
def shared(path: Path, size: int, **others: object) -> Iterator[SimpleNamespace]:
    """What `run_chunks` needs of a runner, over several ranks."""
    config = EngineConfig.from_options(**options(path, tensor_parallel_size=size, **others))
    runner, steps, ranks = launch(config, open_checkpoint(path), path, launcher=ForkLauncher())
    assert ranks is not None
    try:
        yield SimpleNamespace(
            cache=runner.cache,
            plan=runner.plan,
            execute=steps.execute,
            group=runner.place.group,
            runner=runner,
        )
    finally:
        ranks.close()


@pytest.mark.parametrize(
    ("family", "quant", "size"),
    [
        ("smollm2", "int8", 3),
        ("gemma3", "int8", 2),
        ("llama", "sparse24:int8", 2),
        ("llama-biases", MIXES[1], 4),
        ("qwen3", MIXES[0], 4),
        ("qwen2-sliding", "int4:g0,*.down_proj=int8,lm_head=none", 2),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in [
                ("smollm2", "int4", 3),
                ("smollm2", "sparse24:int4", 3),
                ("gemma3", "int4:rotated", 2),
                ("llama-biases", "int8", 4),
                ("qwen3", "none", 4),
                ("mistral", "nf4", 2),
                ("llama", "codebook4", 4),
            ]
        ),
        *(
            pytest.param(family, quant, size, marks=pytest.mark.slow)
            for family in TINY_CONFIGS
            for quant in MIXES[: 4 if family == "llama" else 2]
            for size in ((3,) if family == "smollm2" else (2, 4))
            if (family, quant, size) not in [("llama-biases", MIXES[1], 4), ("qwen3", MIXES[0], 4)]
        ),
    ],
)
def test_logits_are_those_of_one_rank_to_the_bit(family: str, quant: str, size: int, tmp_path: Path) -> None:
    config = deepcopy(TINY_CONFIGS[family])
    config.intermediate_size = 192  # is shared by three, too; of four, ranks would have no whole blocks of 32
    write_checkpoint(tmp_path, config)
    if quant.startswith("sparse24"):
        prune_checkpoint(tmp_path)
    alone = make_runner(tmp_path, quant=quant)
    with shared(tmp_path, size, quant=quant) as together:
        assert together.runner.model.num_bytes < 0.7 * alone.model.num_bytes
        check_logits(alone, together)
        assert together.group.num_bytes["gather"] > 0
        down = together.runner.model.layers[0].mlp.down
        sums_integers = isinstance(down.split, RowParallelIntegerSum)
        if quant.startswith(("int8", "sparse24:int8")) and cpu.library() is not None:
            assert sums_integers == (size < 4 and "weight-only" not in quant)
        assert sums_integers or isinstance(down.split, RowParallelGather)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "quant", "size"),
    [("llama", "int8", 3), ("gemma", "int8", 2), ("llama", "int4", 3), ("gemma", "int4", 4)],
)
def test_published_models_have_the_logits_of_one_rank(model: str, quant: str, size: int) -> None:
    """SmolLM2 has 9 heads and 3 of keys and values; Gemma 4 and 1, which both of its ranks have."""
    try:
        path = resolve_model(model)
    except ModelNotFoundError as error:
        pytest.skip(str(error))
    with shared(path, size, quant=quant, max_model_len=256) as together:
        check_logits(make_runner(path, quant=quant, max_model_len=256), together)


def check_logits(alone: ModelRunner, together: Any) -> None:
    """Of sequences in chunks: those of several ranks are those of one, to the bit."""
    sequences = make_sequences(alone.model_config.vocab_size, CHUNKS)
    expected = run_chunks(alone, sequences, CHUNKS)
    computed = run_chunks(together, sequences, CHUNKS)
    for one, several in zip(expected, computed, strict=True):
        assert one.keys() == several.keys()
        for position, logits in one.items():
            assert torch.equal(logits, several[position])


def generate(path: Path, **others: object) -> tuple[dict[str, list[SampledToken]], int]:
    """Tokens and log-probabilities, those of prompts too, of requests that wait for each other's blocks, and how many
    were preempted.
    """
    config = EngineConfig.from_options(**options(path, max_num_batched_tokens=16, max_num_seqs=4, **others))
    core = start_engine(config, path, eos_token_ids=[])
    tokens: dict[str, list[SampledToken]] = {}
    try:
        for index in range(6):
            prompt = [(7 * index + place) % 300 + 3 for place in range(10 + index)]
            asked = 2 if index % 3 == 0 else None
            params = SamplingParams(
                max_tokens=24, temperature=0.9 * (index % 2), logprobs=1, prompt_logprobs=asked
            )
            core.add_request(
                Request(request_id=str(index), prompt_token_ids=prompt, params=params, seed=index)
            )
        while core.has_work:
            for output in core.step():
                assert output.error is None
                tokens.setdefault(output.request_id, []).extend(output.tokens)
                if output.prompt_logprobs is not None:
                    name = f"prompt {output.request_id}"
                    tokens.setdefault(name, []).extend(output.prompt_logprobs.unpack())
        return tokens, core.stats.num_preemptions
    finally:
        core.close()


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize(
    ("family", "quant", "tensor", "pipeline", "memory"),
    [
        pytest.param("llama", "int8", 1, 2, "24KiB", marks=pytest.mark.slow),
        ("gemma3", "int4", 2, 2, "34KiB"),
        pytest.param("smollm2", "int8", 1, 3, "10KiB", marks=pytest.mark.slow),
        pytest.param("qwen3", "none", 2, 3, "40KiB", marks=pytest.mark.slow),
    ],
)
def test_stages_give_the_tokens_of_one_rank(
    family: str, quant: str, tensor: int, pipeline: int, memory: str, tmp_path: Path
) -> None:
    """The cache of the stages is so small that some sequences are preempted."""
    write_checkpoint(tmp_path, TINY_CONFIGS[family])
    expected, _ = generate(tmp_path, quant=quant)
    lengths = {name: len(tokens) for name, tokens in expected.items()}
    assert lengths == {**{str(index): 24 for index in range(6)}, "prompt 0": 9, "prompt 3": 12}
    sizes = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
    found, num_preemptions = generate(tmp_path, quant=quant, **sizes, kv_cache_memory=memory)
    assert found == expected
    assert num_preemptions > 0
