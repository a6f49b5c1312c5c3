"""What the operations of the C library take, as it says itself, and the check of a call before any C code sees it.

The list of operations is kernels/cpu/operations.h; the library exports it as a table.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter

import torch

Argument = torch.Tensor | int | float | None
"""What an operation takes: a tensor stands for its address, None for the null address."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument of an operation.

    Attributes:
        kind: "int" or "float"; else the name of an address's elements, as torch has it, or "any".
        is_optional: Whether the address may be null.
    """

    name: str
    kind: str
    is_optional: bool

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that a tensor must have; None where any will do, and for numbers."""
        return None if self.kind in ("int", "float", "any") else getattr(torch, self.kind)

    @property
    def expected(self) -> str:
        """What is expected, in words."""
        if self.kind in ("int", "float"):
            return f"of type {self.kind}"
        elements = "" if self.kind == "any" else f" of {self.kind}"
        return f"a tensor{elements} on the CPU{' or None' if self.is_optional else ''}"


class Operation:
    """An operation's code and what it takes.

    Args:
        address: Where the code lies.
        parameters: In the order in which their words lie in memory.
    """

    def __init__(self, name: str, address: int, parameters: tuple[Parameter, ...]) -> None:
        self.name, self.address, self.parameters = name, address, parameters
        self._in_order = itemgetter(*(each.name for each in parameters))
        self._checks = [(each.kind, each.dtype, each.is_optional) for each in parameters]
        formats = {"int": "q", "float": "d"}
        self._layout = struct.Struct("".join(formats.get(each.kind, "Q") for each in parameters))
        self._array = ctypes.c_int64 * len(parameters)

    def words(self, arguments: Mapping[str, Argument]) -> ctypes.Array[ctypes.c_int64]:
        """The words of a call in memory.

        Raises:
            TypeError: An argument is missing, unknown, or not what the operation takes.
        """
        try:
            values = self._in_order(arguments)
        except KeyError as missing:
            raise TypeError(f"{self.name}: {missing.args[0]} is missing, {self._takes()}") from None
        if len(values) != len(arguments):
            unknown = next(iter(arguments.keys() - {parameter.name for parameter in self.parameters}))
            raise TypeError(f"{self.name}: {unknown} is unknown, {self._takes()}")
        words: list[int | float] = []
        for value, (kind, dtype, is_optional) in zip(values, self._checks, strict=True):
            if isinstance(value, torch.Tensor):
                if value.is_cpu and (value.dtype is dtype or kind == "any"):
                    words.append(value.data_ptr())
                    continue
            elif value is None:
                if is_optional:
                    words.append(0)
                    continue
            elif type(value).__name__ == kind:
                words.append(value)
                continue
            parameter = self.parameters[len(words)]
            message = f"{parameter.name} must be {parameter.expected}, got {_described(value)}"
            raise TypeError(f"{self.name}: {message}")
        return self._array.from_buffer_copy(self._layout.pack(*words))

    def _takes(self) -> str:
        return f"it takes {', '.join(parameter.name for parameter in self.parameters)}"


def _described(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} on {value.device}"
    return "None" if value is None else f"{value!r} of type {type(value).__name__}"


class _Signature(ctypes.Structure):
    """As in kernels/cpu/operations.c."""

    _fields_ = (("name", ctypes.c_char_p), ("arguments", ctypes.c_char_p), ("body", ctypes.c_void_p))


def read_operations(functions: ctypes.CDLL) -> dict[str, Operation]:
    """The operations of a library by name."""
    size = ctypes.c_int64.in_dll(functions, "NUM_SIGNATURES").value
    table = (_Signature * size).in_dll(functions, "SIGNATURES")
    return {
        entry.name.decode(): Operation(
            entry.name.decode(), entry.body, tuple(map(_parameter, entry.arguments.decode().split()))
        )
        for entry in table
    }


def _parameter(text: str) -> Parameter:
    name, kind = text.split(":")
    return Parameter(name, kind.removesuffix("?"), kind.endswith("?"))
