"""What the formats share: settings and tensors checked as they are read, packed words, and the weight they make.

w[n, k] = (codes[n, k] - zero[n, g]) * scale[n, g]      g = k // group_size, or what a group index says of k
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from engine.errors import CheckpointError
from engine.kernels.nibbles import unpack_nibbles
from engine.quant.weight import GridWeight, Weight

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WORD_BITS = 32

Shape = tuple[int | None, ...]
"""Sizes; None is any."""


@dataclass(frozen=True)
class Settings:
    """A JSON object of config.json.

    Attributes:
        file: The config.json.
        key: Where the object stands in it, like "quantization_config".
    """

    file: Path
    key: str
    values: dict[str, Any]

    def choice(self, key: str, allowed: Collection[Any], default: object = None) -> Any:
        """The value of a key, one of `allowed`.

        Args:
            default: For a key that is missing or null.

        Raises:
            CheckpointError: It is something else, or missing without a default.
        """
        value = self.values.get(key)
        value = default if value is None else value
        # In Python 1 == True == 1.0; in JSON they differ.
        if not any(type(value) is type(option) and value == option for option in allowed):
            raise self.error(key, f"one of {', '.join(repr(option) for option in allowed)}")
        return value

    def group_size(self, default: int | None = None) -> int:
        """`group_size`: positive, or -1 for whole rows.

        Raises:
            CheckpointError: It is something else, or missing without a default.
        """
        value = self.values.get("group_size")
        value = default if value is None else value
        if type(value) is not int or (value < 1 and value != -1):
            raise self.error("group_size", "a positive number or -1")
        return value

    def object(self, key: str) -> Settings:
        """A nested object; a missing or null one is empty.

        Raises:
            CheckpointError: It is no object.
        """
        value = self.values.get(key)
        if not isinstance(value, dict | None):
            raise self.error(key, "an object")
        return Settings(self.file, f"{self.key}.{key}", value or {})

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of strings; a missing or null one is empty.

        Raises:
            CheckpointError: It is no list of strings.
        """
        value = self.values.get(key)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "a list of strings")
        return tuple(value)

    def error(self, key: str, expected: str) -> CheckpointError:
        """That the key's value cannot be read."""
        return CheckpointError(
            f"{self.file}: {self.key}.{key}: expected {expected}, found {self.values.get(key)!r}"
        )


def grid_scheme(bits: int, group_size: int, is_symmetric: bool) -> str:
    """The specification of the scheme that keeps a grid, "int4:g128" for one; "none" if there is none.

    Args:
        bits: 4 or 8.
        group_size: -1 for whole rows.
    """
    if bits == 8 and not is_symmetric:
        return "none"
    if group_size == -1:
        return "int4:g0" if bits == 4 else "int8"
    return "none" if group_size % 32 else f"int{bits}:g{group_size}"


def is_left_out(module: str, names: Collection[str]) -> bool:
    """Whether a list of modules that are not quantized has a module, or one around it.

    Args:
        names: Whole names or whole parts of them, like "lm_head", "layers.0.mlp" or "down_proj".
    """
    return any(f".{name}." in f".{module}." for name in names)


class TensorSource(Protocol):
    """The tensors of a directory, by the names that they have without a multimodal wrapper."""

    def __contains__(self, name: str) -> bool: ...

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor as it is stored.

        Raises:
            CheckpointError: It is missing or damaged.
        """
        ...

    def locate(self, name: str) -> tuple[Path, str]:
        """The file of a tensor and its name there."""
        ...


@dataclass(frozen=True)
class StoredModule:
    """The stored tensors ("parts") of one module.

    Attributes:
        name: Like "model.layers.0.self_attn.q_proj".
    """

    source: TensorSource
    name: str

    def has(self, part: str) -> bool:
        """Whether the part is stored."""
        return f"{self.name}.{part}" in self.source

    def names(self, part: str) -> tuple[str, str]:
        """The module's name, and the one that it has in the file of a part."""
        stored = self.source.locate(f"{self.name}.{part}")[1]
        return self.name, stored.removesuffix(f".{part}")

    def read(
        self, part: str, dtypes: Collection[torch.dtype] | None = None, shape: Shape | None = None
    ) -> torch.Tensor:
        """Read a part; None allows any type or shape.

        Raises:
            CheckpointError: It is missing, damaged, or of another type or shape.
        """
        tensor = self.source.read(f"{self.name}.{part}")
        if tensor.numel() == 0:
            raise self.error(part, "elements", "none")
        if dtypes is not None and tensor.dtype not in dtypes:
            raise self.error(part, " or ".join(map(_dtype_name, dtypes)), _dtype_name(tensor.dtype))
        if shape is not None and not _fits(tensor.shape, shape):
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise self.error(part, f"shape [{sizes}]", str(list(tensor.shape)))
        return tensor

    def read_group_index(self, part: str, in_features: int, num_groups: int) -> torch.Tensor:
        """Read the group of each column, [in_features] int64.

        Raises:
            CheckpointError: As `read`, or a group does not exist.
        """
        index = self.read(part, (torch.int32, torch.int64), (in_features,)).long()
        lowest, highest = int(index.min()), int(index.max())
        if lowest < 0 or highest >= num_groups:
            raise self.error(part, f"groups of 0 to {num_groups - 1}", f"{lowest} to {highest}")
        return index

    def error(self, part: str, expected: str, found: str) -> CheckpointError:
        """That a part cannot be read."""
        file, stored_name = self.source.locate(f"{self.name}.{part}")
        return CheckpointError(f"{file}: tensor {stored_name!r}: expected {expected}, found {found}")


def packed_size(elements: int, bits: int) -> int:
    """How many words hold so many elements."""
    return -(-elements * bits // WORD_BITS)


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """[R, W] int32 → [R, W * 32 / bits] uint8 of 0..2^bits - 1, a word's first element in its lowest bits."""
    # The engine's machines are little-endian: a word's lowest byte comes first in memory.
    elements = words.flatten().view(torch.uint8).view(words.shape[0], -1)
    return elements if bits == 8 else unpack_nibbles(elements)


def make_weight(
    codes: torch.Tensor,
    zero: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    group_size: int,
    group_index: torch.Tensor | None = None,
) -> Weight:
    """The weight of unsigned codes: a grid if one holds it, else floats.

    Args:
        codes: [N, K] uint8 of 0..2^bits - 1.
        zero: [N, G] integers, the codes of zero.
        scale: [N, G] float.
        bits: 4 or 8.
        group_index: The group of each column, [K] int64; None for consecutive groups.

    Returns:
        A grid if groups are consecutive, and of eight bits only if symmetric; otherwise [N, K] float32.
    """
    # bfloat16 has a range that fp16 has not.
    scale = scale.float() if scale.dtype == torch.bfloat16 else scale
    consecutive = torch.arange(codes.shape[1]) // group_size
    if group_index is None or torch.equal(group_index, consecutive):
        if bits == 4:
            return GridWeight(codes, scale, -zero * scale.float(), group_size)
        if torch.all(zero == 128):
            # Flipping the highest bit takes 128 off.
            return GridWeight((codes ^ 0x80).view(torch.int8), scale, None, group_size)
        group_index = consecutive
    return (codes.float() - zero[:, group_index]) * scale.float()[:, group_index]


def _fits(actual: torch.Size, expected: Shape) -> bool:
    return len(actual) == len(expected) and all(
        size in (None, found) for size, found in zip(expected, actual, strict=True)
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
