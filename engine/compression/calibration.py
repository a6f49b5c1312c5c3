"""Calibration: what a checkpoint's linear layers are given as inputs, found layer by layer.

Only one layer's float weights are in memory at a time. The text goes through a layer once to collect statistics and,
after the layer has been quantized, once more: the next layer is calibrated on what it will really get.
"""

from __future__ import annotations

import hashlib
import pydoc_data.topics
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from engine.compression.gptq import InputStatistics
from engine.errors import ConfigError
from engine.kernels.attention.kv_layer import KVCache
from engine.kernels.attention.plan import AttentionPlan
from engine.kernels.operands import Activations, Format
from engine.kernels.rotary import torch_rotate_and_write
from engine.loading.checkpoint import Checkpoint
from engine.models.attention import PagedInputs
from engine.models.config import ModelConfig
from engine.models.decoder import DecoderLayer
from engine.models.linear import Linear
from engine.models.modules import ROLES, readers
from engine.models.norm import RMSNorm
from engine.models.rope import RotaryTable
from engine.parallel.group import TensorGroup
from engine.quant.floating import FloatMatmul
from engine.quant.plan import QuantizationPlan
from engine.quant.weight import to_float
from engine.quant_spec import parse_quant_spec
from engine.tokenizer.tokenizer import Tokenizer

BATCH_TOKENS = 4096
"""Tokens that go through a layer at once."""

_BLOCK_SIZE = 256


def default_text() -> str:
    """The text of Python's own help topics: English and code, on every machine."""
    return "\n\n".join(pydoc_data.topics.topics.values())


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """Windows of a text.

    Attributes:
        token_ids: [windows, length] int64.
        digest: Of the token ids, for the record.
    """

    token_ids: torch.Tensor
    digest: str

    @staticmethod
    def sample(text: str, tokenizer: Tokenizer, windows: int, length: int, seed: int) -> CalibrationText:
        """Windows from random places; they may overlap where the text is short.

        Raises:
            ConfigError: The text is shorter than a window.
        """
        token_ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
        if len(token_ids) < length:
            raise ConfigError(
                f"calibration: the text has {len(token_ids)} tokens, a window {length}; give more"
            )
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(token_ids) - length + 1, (windows,), generator=generator)
        chosen = torch.stack([token_ids[start : start + length] for start in starts.tolist()])
        return CalibrationText(chosen, hashlib.blake2b(chosen.numpy().tobytes(), digest_size=8).hexdigest())


@dataclass(slots=True)
class _Recorder:
    """A float product that notes what it is given."""

    product: FloatMatmul
    statistics: InputStatistics | None
    format: Format = None

    def __call__(self, x: Activations) -> torch.Tensor:
        """[M, K] → [M, N]."""
        assert isinstance(x, torch.Tensor)
        if self.statistics is not None:
            self.statistics.update(x)
        return self.product(x)


class CalibratedLayer:
    """One layer, its float weights loaded and its inputs seen.

    Attributes:
        index: Its place in the model.
        linears: By role (`engine.models.modules`).
        norms: Before projections, by name.
        statistics: Of the inputs, by role.
    """

    def __init__(self, index: int, config: ModelConfig, checkpoint: Checkpoint) -> None:
        self.index = index
        floats = QuantizationPlan(parse_quant_spec("none"), torch.float32)
        self.module = DecoderLayer(index, config, floats, torch.float32, TensorGroup())
        # As attention here: torch's operators use all threads, where the C bodies use them in a program only.
        self.module.attention.rotate_and_write = torch_rotate_and_write
        for module in self.module.modules():
            if isinstance(module, (Linear, RMSNorm)):
                module.load(lambda name, part: to_float(checkpoint.tensor(name)))
        self.linears = self.module.linears
        self.norms = self.module.norms
        self.statistics: dict[str, InputStatistics] = {}
        for role in ROLES:
            linear = self.linears[role.name]
            tensors = dict(linear.named_buffers())
            product = FloatMatmul(tensors["weight"], tensors.get("bias"))
            # All that read a norm have the same inputs: the first notes them.
            first = role if role.norm is None else readers(role.norm)[0]
            if role is first:
                self.statistics[role.name] = InputStatistics.empty(linear.in_features)
            else:
                self.statistics[role.name] = self.statistics[first.name]
            linear.matmul = _Recorder(product, self.statistics[role.name] if role is first else None)

    def weights(self, role: str) -> dict[str, torch.Tensor]:
        """The float weights [N, K] of a role by the checkpoint's module names; views of what the layer computes with.

        Writing into them changes what the next layer is calibrated on.
        """
        return self._parts(role, "weight")

    def biases(self, role: str) -> dict[str, torch.Tensor]:
        """The biases [N], as `weights`; empty if the role has none."""
        return self._parts(role, "bias") if self.linears[role].has_bias else {}

    def _parts(self, role: str, name: str) -> dict[str, torch.Tensor]:
        linear = self.linears[role]
        parts = torch.split(dict(linear.named_buffers())[name], list(linear.sizes))
        return dict(zip(linear.sources, parts, strict=True))

    def stop_recording(self) -> None:
        for linear in self.linears.values():
            assert isinstance(linear.matmul, _Recorder)
            linear.matmul.statistics = None


class Calibration:
    """A text on its way through a model.

    Args:
        token_ids: [windows, length] int64.

    Attributes:
        hidden: [windows * length, hidden] float32, the hidden states that the next layer gets.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, token_ids: torch.Tensor) -> None:
        self._checkpoint, self._config = checkpoint, config
        length = token_ids.shape[1]
        table = to_float(checkpoint.tensor("model.embed_tokens.weight"))
        self.hidden = table[token_ids].float().flatten(0, 1) * config.embedding_scale
        self._length, self._batch = length, max(1, BATCH_TOKENS // length)
        num_blocks = -(-length // _BLOCK_SIZE)
        blocks = torch.arange(1, 1 + self._batch * num_blocks, dtype=torch.int32)
        self._block_tables = blocks.view(self._batch, num_blocks)
        self._cache = KVCache.allocate(
            1,
            1 + self._batch * num_blocks,
            _BLOCK_SIZE,
            config.num_kv_heads,
            config.head_dim,
            torch.float32,
            torch.device("cpu"),
        )
        self._rotary = {
            rope: RotaryTable(rope, config.head_dim, length, torch.device("cpu"))
            for rope in set(config.ropes)
        }

    @torch.no_grad()
    def layers(self, known: set[int]) -> Iterator[CalibratedLayer]:
        """Each layer with its statistics; what is written into its weights until the next one is asked for counts.

        Args:
            known: Layers that need no statistics, since their new weights are known already.
        """
        for index in range(self._config.num_layers):
            layer = CalibratedLayer(index, self._config, self._checkpoint)
            if index not in known:
                self._run(layer)
            layer.stop_recording()
            yield layer
            self.hidden = self._run(layer)

    @torch.no_grad()
    def head_statistics(self) -> InputStatistics:
        """What the vocabulary projection is given; to be asked for behind the last layer."""
        config = self._config
        norm = RMSNorm(
            "model.norm", config.hidden_size, config.norm_epsilon, config.norm_offset, torch.float32
        )
        norm.load(lambda name, part: self._checkpoint.tensor(name))
        statistics = InputStatistics.empty(config.hidden_size)
        for hidden in torch.split(self.hidden, BATCH_TOKENS):
            x = norm(hidden)
            assert isinstance(x, torch.Tensor)
            statistics.update(x)
        return statistics

    def _run(self, layer: CalibratedLayer) -> torch.Tensor:
        """The hidden states [windows * length, hidden] behind the layer."""
        outputs = []
        for hidden in torch.split(self.hidden, self._batch * self._length):
            x = hidden.clone()
            delta = layer.module(x, None, self._cache.layer(0), self._inputs(len(x) // self._length))
            outputs.append(x + delta)
        return torch.cat(outputs)

    def _inputs(self, windows: int) -> PagedInputs:
        positions = torch.arange(self._length, dtype=torch.int32)
        block_tables = self._block_tables[:windows]
        slots = block_tables[:, positions // _BLOCK_SIZE] * _BLOCK_SIZE + positions % _BLOCK_SIZE
        plan = AttentionPlan(
            query_starts=torch.arange(windows + 1, dtype=torch.int32) * self._length,
            starts=torch.zeros(windows, dtype=torch.int32),
            table_rows=torch.arange(windows, dtype=torch.int32),
            block_tables=block_tables,
        )
        return PagedInputs(
            positions.repeat(windows),
            slots.flatten(),
            dict.fromkeys(self._config.sliding_windows, plan),
            self._rotary,
            batch_invariant=False,
        )
