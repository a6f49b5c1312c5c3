"""How near a figure is to what the machine can do at most: its share of the bytes that memory gives, and of the int8
multiply-adds that all threads make.

Both peaks are measured on the spot (peaks.c, which does not try AMX). What a scenario asks for is counted from
the model's shape: each decode step reads the weights once, and the keys and values of every sequence; each token is
multiplied with every weight, and its queries with the keys and values before it. Multiply-adds are the model's,
whatever a kernel adds to them.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cpu_scenarios import Scenario
from engine.config import EngineConfig
from engine.errors import EngineError
from engine.kernels.attention.kv_layer import block_bytes
from engine.loading.dummy import open_model
from engine.loading.resolve import resolve_configuration
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.modules import ROLES
from engine.parallel.group import TensorGroup
from engine.parallel.pipeline import Pipeline
from engine.plan import plan_engine
from engine.quant.plan import QuantizationPlan

_PROBE = Path(__file__).parent / "peaks.c"


@dataclass(frozen=True, slots=True)
class Peaks:
    """Bytes read from memory and int8 multiply-adds a second, by all usable processors together."""

    bytes_per_second: float
    products_per_second: float


def measure_peaks() -> Peaks:
    """Builds and runs the probe, which takes some seconds.

    Raises:
        EngineError: There is no C compiler `cc`, or the processor has no int8 dot products that the probe knows.
    """
    num_threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as directory:
        program = f"{directory}/peaks"
        try:
            build = ["cc", "-O3", "-march=native", "-pthread", "-o", program, str(_PROBE)]
            subprocess.run(build, check=True, capture_output=True, text=True)
            answer = subprocess.run([program, str(num_threads)], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            cause = (getattr(error, "stderr", None) or str(error)).strip()
            raise EngineError(f"{_PROBE.name} does not run here: {cause}") from None
    read, multiplied = map(float, answer.stdout.split())
    return Peaks(read, multiplied)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model asks of a machine.

    Attributes:
        weight_bytes: What a decode step reads of the weights; None: not known.
        cache_bytes: Keys and values of a token in one layer.
        layer_products: Multiply-adds of a token with the weights of all layers.
        head_products: Those that its logits take.
        attention_products: Those of a token with an earlier one, in one layer.
        windows: Of each layer's attention, in tokens; None: all.
    """

    weight_bytes: int | None
    cache_bytes: int
    layer_products: int
    head_products: int
    attention_products: int
    windows: Sequence[int | None]

    def reach(self, context: float) -> float:
        """Earlier tokens that a token attends to, of all layers together."""
        return sum(context if window is None else min(context, window) for window in self.windows)

    def demand(self, scenario: Scenario) -> tuple[float | None, float]:
        """Bytes and multiply-adds of what a scenario's figure is about."""
        is_prefill = scenario.metric == "prefill_tokens_per_second"
        # The first token of a decode is the prefill's, and no part of a rate between tokens.
        steps = 0 if is_prefill else scenario.output_tokens - (scenario.metric == "decode_tokens_per_second")
        decoded = self.reach(scenario.prompt_tokens + scenario.output_tokens / 2)
        token = self.layer_products + self.head_products + self.attention_products * decoded
        products = steps * scenario.streams * token
        num_bytes = steps * scenario.streams * self.cache_bytes * decoded
        if not scenario.is_warm:
            steps += 1
            own = scenario.streams * scenario.own_tokens
            products += (scenario.shared_tokens + own) * self.layer_products
            products += (
                own * self.attention_products * self.reach(scenario.shared_tokens + scenario.own_tokens / 2)
            )
            products += (
                scenario.shared_tokens * self.attention_products * self.reach(scenario.shared_tokens / 2)
            )
        return None if self.weight_bytes is None else num_bytes + steps * self.weight_bytes, products


def seconds_of(scenario: Scenario, value: float) -> float:
    """How long what a figure is about took."""
    if scenario.metric == "duration":
        return value
    tokens = {
        "decode_tokens_per_second": scenario.output_tokens - 1,
        "output_tokens_per_second": scenario.streams * scenario.output_tokens,
        "prefill_tokens_per_second": scenario.prompt_tokens,
    }[scenario.metric]
    return tokens / value


def shares(
    scenario: Scenario, value: float, footprint: Footprint, peaks: Peaks
) -> tuple[float | None, float]:
    """Which shares of the peaks' bytes and multiply-adds a figure means."""
    seconds = seconds_of(scenario, value)
    num_bytes, products = footprint.demand(scenario)
    read = None if num_bytes is None else num_bytes / seconds / peaks.bytes_per_second
    return read, products / seconds / peaks.products_per_second


def footprint_of_engine(config: EngineConfig) -> Footprint:
    """What a server of ours reads and multiplies, from the model's layers without their data.

    Raises:
        EngineError: The model is not there, or not of a kind that is supported.
    """
    checkpoint = open_model(resolve_configuration(config.model), config.load_format)
    plan = plan_engine(config, checkpoint.config, auto_schemes=checkpoint.auto_schemes)
    model = ModelConfig.from_dict(checkpoint.config)
    quantization = QuantizationPlan(plan.config.quant_spec, plan.dtype, config.deterministic)
    decoder = Decoder(model, quantization, plan.dtype, TensorGroup(), Pipeline())
    assert decoder.embedding is not None
    # A table is read whole only where it is the head, too.
    table = 0 if decoder.shares_table else sum(buffer.nbytes for buffer in decoder.embedding.buffers())
    cache_bytes = block_bytes(1, 1, model.num_kv_heads, model.head_dim, plan.cache_dtype)
    return _footprint(model, decoder.num_bytes - table, cache_bytes)


def footprint_of_peer(model: str, weights: Path | None) -> Footprint:
    """What a peer with the same model reads and multiplies: its weights' file, and a cache of 16-bit floats."""
    config = ModelConfig.from_dict(open_model(resolve_configuration(model), "auto").config)
    cache_bytes = block_bytes(1, 1, config.num_kv_heads, config.head_dim, torch.float16)
    return _footprint(config, None if weights is None else weights.stat().st_size, cache_bytes)


def _footprint(model: ModelConfig, weight_bytes: int | None, cache_bytes: int) -> Footprint:
    layer = sum(role.in_features(model) * role.out_features(model) for role in ROLES)
    return Footprint(
        weight_bytes=weight_bytes,
        cache_bytes=cache_bytes,
        layer_products=model.num_layers * layer,
        head_products=model.hidden_size * model.vocab_size,
        attention_products=2 * model.num_heads * model.head_dim,
        windows=model.sliding_windows,
    )
