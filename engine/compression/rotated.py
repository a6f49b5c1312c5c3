"""A checkpoint seen through a rotation: the same function of tokens, with no channel that stands out.

The residual stream x becomes x Q (`engine.compression.hadamard`). Norms' weights move into the weights behind
them, and embedding and vocabulary projection, if they were one, become two. One rotated layer is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from engine.compression.hadamard import make_rotation, rotate_ends, rotate_layer
from engine.loading.checkpoint import Checkpoint
from engine.loading.slices import check_shape, take_slices
from engine.models.config import ModelConfig
from engine.models.modules import ROLES
from engine.parallel.shards import WHOLE, Slices
from engine.quant.weight import Weight, to_float
from engine.quant_spec import SchemeSpec

ROTATION_SEED = 0
"""Seeds the rotation's signs: the same model is always rotated the same way."""

_CHUNK = 1024
"""Rows of embedding and vocabulary projection that are rotated at once."""

_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

_ROLES = {
    "input_layernorm.weight": "attention_norm",
    "post_attention_layernorm.weight": "mlp_norm",
    "self_attn.q_norm.weight": "q_norm",
    "self_attn.k_norm.weight": "k_norm",
    **{
        f"{projection.name}.{kind}": projection.short if kind == "weight" else f"{projection.short}_bias"
        for role in ROLES
        for projection in role.projections
        for kind in ("weight", "bias")
    },
}
"""What `rotate_layer` calls the tensors of a layer."""


class RotatedCheckpoint:
    """See `engine.loading.checkpoint.Checkpoint`; all tensors that the rotation changes are float32.

    Args:
        config: Of a model without norms behind attention and MLP.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self._checkpoint, self._model = checkpoint, config
        self._rotation = make_rotation(config.hidden_size, ROTATION_SEED)
        self._layer: dict[str, torch.Tensor] = {}
        self._prefix = ""
        self.path = checkpoint.path
        self.generation_config = checkpoint.generation_config
        self.recommended_params = checkpoint.recommended_params
        self.config: dict[str, Any] = {**checkpoint.config, "tie_word_embeddings": False}

    def names(self) -> set[str]:
        return self._checkpoint.names() | {_HEAD}

    def other_names(self) -> set[str]:
        return set()

    def auto_schemes(self, modules: Iterable[str]) -> dict[str, SchemeSpec]:
        return {}

    @property
    def num_bytes_read(self) -> int:
        return self._checkpoint.num_bytes_read

    def tensor(self, name: str, part: Slices = WHOLE, shape: tuple[int, ...] | None = None) -> Weight:
        weight = self._whole(name)
        check_shape(self.path, name, weight.shape, shape)
        return take_slices(weight, part, name)

    def _whole(self, name: str) -> Weight:
        if name in (_EMBEDDING, _NORM, _HEAD):
            return self._end(name)
        prefix, role = self._role(name)
        if role is None:
            return self._checkpoint.tensor(name)
        if prefix != self._prefix:
            self._layer, self._prefix = self._rotate(prefix), prefix
        return self._layer[role]

    def _end(self, name: str) -> torch.Tensor:
        """Embedding, last norm or head."""
        norm = to_float(self._checkpoint.tensor(_NORM))
        source = _EMBEDDING if self._model.ties_embeddings or name == _EMBEDDING else _HEAD
        key = {_EMBEDDING: "embedding", _NORM: "norm", _HEAD: "head"}[name]
        stored = self._checkpoint.tensor(source)

        def rotate(start: int, stop: int) -> torch.Tensor:
            index = torch.arange(start, min(stop, stored.shape[0]))
            rows = to_float(stored[index] if isinstance(stored, torch.Tensor) else stored.rows(index))
            return rotate_ends(rows, norm, rows, self._rotation, self._model.norm_offset)[key]

        if name == _NORM:
            return rotate(0, 1)
        rotated = torch.empty(stored.shape)
        for start in range(0, len(rotated), _CHUNK):
            rotated[start : start + _CHUNK] = rotate(start, start + _CHUNK)
        return rotated

    def _role(self, name: str) -> tuple[str, str | None]:
        """The prefix of the tensor's layer, and the tensor's role there; None if the rotation knows none."""
        start = "model.layers."
        if not name.startswith(start):
            return "", None
        index, _, rest = name.removeprefix(start).partition(".")
        return f"{start}{index}.", _ROLES.get(rest)

    def _rotate(self, prefix: str) -> dict[str, torch.Tensor]:
        names = self._checkpoint.names()
        tensors = {
            role: to_float(self._checkpoint.tensor(prefix + rest))
            for rest, role in _ROLES.items()
            if prefix + rest in names
        }
        return rotate_layer(tensors, self._rotation, self._model.norm_offset)
