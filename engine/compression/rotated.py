"""A checkpoint seen through a rotation: the same function of tokens, with no channel that stands out.

The residual stream x becomes x Q (`engine.compression.hadamard`). Norms' weights move into the weights behind
them, and embedding and vocabulary projection, if they were one, become two. One rotated layer is in memory at a time.
"""

from __future__ import annotations

import torch

from engine.compression.hadamard import make_rotation, rotate_ends, rotate_layer
from engine.compression.view import CheckpointView
from engine.loading.checkpoint import Checkpoint
from engine.models.config import ModelConfig
from engine.models.modules import ROLES
from engine.quant.weight import Weight, to_float

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


def rotated(checkpoint: Checkpoint, config: ModelConfig) -> CheckpointView:
    """The checkpoint through the rotation; all tensors that it changes are float32.

    Args:
        config: Of a model without norms behind attention and MLP.
    """
    changes = {"tie_word_embeddings": False}
    return CheckpointView(
        checkpoint, changes, checkpoint.names() | {_HEAD}, _Rotated(checkpoint, config).tensor
    )


class _Rotated:
    """The rotated tensors of a checkpoint, of which a layer's are kept while it is read."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self._checkpoint, self._model = checkpoint, config
        self._rotation = make_rotation(config.hidden_size, ROTATION_SEED)
        self._layer: dict[str, torch.Tensor] = {}
        self._prefix = ""

    def tensor(self, name: str) -> Weight:
        """A whole tensor."""
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
