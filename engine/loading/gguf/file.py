"""A GGUF file as it lies on disk: metadata by key, tensors by GGUF name."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    ReaderField,
    ReaderTensor,
)

from engine.errors import CheckpointError
from engine.loading.file_kinds import PART_NAME, check_regular, part_number

_LENGTH = struct.Struct("<Q")


class _Strings:
    """An array of strings as it lies in the file, each with its length before it: objects of their own would take
    some 20 MB for a vocabulary.

    Attributes:
        num_bytes: That the array takes.
    """

    def __init__(self, data: np.ndarray, count: int) -> None:
        """
        Raises:
            struct.error: The data ends before the array does.
        """
        self._data, self._count = data, count
        # The one loop that every start waits for, so it makes no objects.
        position, bytes_of, read, size = 0, data.data, _LENGTH.unpack_from, _LENGTH.size
        for _ in range(count):
            position += size + read(bytes_of, position)[0]
        self.num_bytes = position

    def __len__(self) -> int:
        return self._count

    def contents(self) -> list[str]:
        """
        Raises:
            UnicodeDecodeError: They are not UTF-8.
        """
        data, strings, end = self._data[: self.num_bytes].tobytes(), [], 0
        for _ in range(self._count):
            start = end + _LENGTH.size
            end = start + _LENGTH.unpack_from(data, end)[0]
            strings.append(data[start:end].decode())
        return strings


class _Reader(GGUFReader):  # type: ignore[misc, unused-ignore]
    """GGUFReader that keeps a metadata array as one piece, and names the tensor whose data is not there.

    The base class makes several numpy objects an element, which costs seconds and much memory for a vocabulary. An
    array of strings is one part here; the parts of all others have the same meaning as ever.
    """

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
            parts: tuple[int, list[Any], list[int], list[GGUFValueType]] = super()._get_field_parts(
                orig_offs, raw_type
            )
            return parts
        item_type = self._get(orig_offs, np.uint32)
        count = self._get(orig_offs + 4, np.uint64)
        types = [GGUFValueType.ARRAY, GGUFValueType(int(item_type[0]))]
        start = orig_offs + 12
        scalar = self.gguf_scalar_to_np.get(types[1])
        if scalar is not None:
            values = self._get(start, scalar, int(count[0]))
            if len(values) != int(count[0]):
                raise ValueError("metadata array runs past the end of the file")
            return 12 + values.nbytes, [item_type, count, values], [2], types
        if types[1] != GGUFValueType.STRING:
            raise ValueError(f"unsupported metadata array of {types[1].name}")
        strings = _Strings(np.asarray(self.data)[start:], int(count[0]))
        return 12 + strings.num_bytes, [item_type, count, strings], [2], types

    def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
        for field in fields:
            self._check_extent(field, start_offs)
        super()._build_tensors(start_offs, fields)

    def _check_extent(self, field: ReaderField, data_start: int) -> None:
        """Raises ValueError unless a tensor's rows are whole blocks of a known type, inside the file."""
        _, name_bytes, _, dimensions, raw_type, offset = field.parts
        name = bytes(name_bytes).decode("utf-8", "replace")
        known = {kind.value: kind for kind in GGMLQuantizationType}
        kind = known.get(int(raw_type[0]))
        if kind is None:
            raise ValueError(f"tensor {name!r} has the unknown type {int(raw_type[0])}")
        # GGUF names the size of a row first.
        sizes = [int(size) for size in dimensions][::-1]
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
        if not sizes or sizes[-1] % block_size:
            raise ValueError(
                f"tensor {name!r}: expected rows of whole {kind.name} blocks of {block_size}, found shape {sizes}"
            )
        expected = math.prod(sizes) // block_size * block_bytes
        found = max(0, len(self.data) - data_start - int(offset[0]))
        if found < expected:
            raise ValueError(
                f"tensor {name!r}: expected {expected} bytes of {kind.name} for shape {sizes}, found {found}"
            )


def _open(path: Path) -> _Reader:
    check_regular(path)
    try:
        return _Reader(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    except (ValueError, KeyError, IndexError, OverflowError, TypeError, MemoryError, struct.error) as error:
        raise CheckpointError(f"{path}: not a valid GGUF file ({error}); download it again") from error


def _other_parts(path: Path, number: int, count: int) -> list[Path]:
    """The files of a model's other parts, beside that of the first.

    Raises:
        CheckpointError: It is not the first, or one is missing.
    """
    first = PART_NAME.sub(f"-00001-of-{count:05}.gguf", path.name)
    if number != 0 or part_number(path) is None:
        raise CheckpointError(f"{path}: part {number + 1} of {count}; the first, {first}, opens all of them")
    parts = [
        path.with_name(PART_NAME.sub(f"-{index:05}-of-{count:05}.gguf", path.name))
        for index in range(2, count + 1)
    ]
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        raise CheckpointError(f"{path}: {missing[0]} is missing ({len(missing)} of its {count} parts are)")
    return parts


class GGUFFile:
    """An open GGUF file, with all parts of a model; tensor data is memory-mapped.

    Attributes:
        architecture: `general.architecture`, the prefix of the model's own keys.
        tensors: The tensors by their GGUF names, as stored.

    Raises:
        CheckpointError: The file is not GGUF, damaged, big-endian, or not the first part of several.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = _open(path)
        self._fields: dict[str, ReaderField] = reader.fields
        self._values: dict[str, Any] = {}
        self.tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in reader.tensors}
        if reader.byte_order != "I":
            raise CheckpointError(
                f"{path}: numbers are big-endian, for machines that are; convert it with gguf-convert-endian"
            )
        num_parts = self.get("split.count", 0)
        if num_parts > 1:
            for part in _other_parts(path, self.get("split.no", 0), num_parts):
                self.tensors |= {tensor.name: tensor for tensor in _open(part).tensors}
        self.architecture: str = self["general.architecture"]

    def forget_values(self) -> None:
        """Lets go of the values that were read, those of a vocabulary take much memory; they can be read again."""
        self._values = {}

    def unread_keys(self, start: str) -> set[str]:
        """Metadata keys with this beginning whose values nobody has asked for."""
        return {key for key in self._fields if key.startswith(start) and key not in self._values}

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def __getitem__(self, key: str) -> Any:
        """The value of a metadata key; raises CheckpointError if it is missing."""
        if key not in self._values:
            if key not in self._fields:
                raise CheckpointError(f"{self.path}: metadata key {key!r} is missing")
            try:
                field = self._fields[key]
                strings = field.parts[field.data[0]] if field.data else None
                self._values[key] = strings.contents() if isinstance(strings, _Strings) else field.contents()
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{self.path}: metadata key {key!r} is not UTF-8 ({error})") from error
        return self._values[key]

    def num_strings(self, key: str) -> int | None:
        """How many strings a key has, which need not be read for it; None if it is missing, or has others."""
        field = self._fields.get(key)
        strings = field.parts[field.data[0]] if field is not None and field.data else None
        return len(strings) if isinstance(strings, _Strings) else None

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key, or `default`."""
        if key not in self:
            return default
        return self[key]
