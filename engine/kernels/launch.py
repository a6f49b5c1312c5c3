"""Launching Triton kernels: for which tensors, on which chip, with which tiles.

Every launch goes through `launch`, so that three things hold for all of them: tiles come from data
(`tiles/*.json`, one file a chip), floating-point fusion is off (Triton's default differs between versions, and
a fused product and sum rounds once where an unfused one rounds twice), and a launch can be recorded instead of
run: under `recording` the engine's own code, given tensors on the meta device, says which kernels it would
launch, for a chip that need not be there.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.errors import ConfigError

TILES_DIRECTORY = Path(__file__).with_name("tiles")
TILES_VARIABLE = "ENGINE_TILES"
"""Environment variable: a JSON file whose operations replace those of the shipped table."""


@dataclass(frozen=True, slots=True)
class Target:
    """A chip that kernels are launched on.

    Attributes:
        arch: "sm_90", "gfx942", …; "interpreter" for Triton's interpreter on the CPU.
        num_processors: Streaming multiprocessors (NVIDIA) or compute units (AMD).
        name: The card's name, which may have a table of tiles of its own.
    """

    arch: str
    num_processors: int
    name: str = ""

    @property
    def is_nvidia(self) -> bool:
        return self.arch.startswith("sm_")


TARGETS = {
    target.arch: target
    for target in (
        Target("sm_80", 108),
        Target("sm_89", 142),
        Target("sm_90", 132),
        Target("sm_100", 148),
        Target("gfx942", 304),
    )
}
"""The chips that kernels are compiled for ahead of time, with the processors of their largest card."""

INTERPRETER = Target("interpreter", 4)


@dataclass(frozen=True, slots=True)
class Tile:
    """How one launch is cut.

    Attributes:
        sizes: Constants of the kernel, e.g. BLOCK_M and BLOCK_N.
        max_tokens: Serves up to this many tokens; None for any number.
    """

    sizes: Mapping[str, int]
    num_warps: int
    num_stages: int
    max_tokens: int | None = None

    def __getitem__(self, name: str) -> int:
        return self.sizes[name]


@dataclass(frozen=True, slots=True)
class Launch:
    """What decides whether a launch needs a compilation: Triton's own specialization, written out.

    Attributes:
        arguments: (name, type) of each argument, e.g. ("x", "*bf16") or ("num_tokens", "i32"), in order.
        aligned: Names of the arguments that are multiples of 16.
        large: Names of the tensors of more than 2 GiB, where that matters (AMD).
        constants: Constant arguments: constexpr ones, None, and integers that are 1.
    """

    kernel: Any = field(compare=False)
    name: str
    arguments: tuple[tuple[str, str], ...]
    aligned: tuple[str, ...]
    large: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Recorder:
    """The launches that `recording` collects."""

    target: Target
    launches: set[Launch] = field(default_factory=set)


def _interprets() -> bool:
    """Whether TRITON_INTERPRET is set, read as Triton reads it, which is imported only where it runs."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


INTERPRETS = _interprets()
"""Whether Triton's interpreter runs the kernels, on the CPU, as of this import."""

_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def recording(target: Target) -> Iterator[set[Launch]]:
    """Launches on meta tensors within this context are collected for `target` instead of run."""
    recorder = Recorder(target)
    token = _recorder.set(recorder)
    try:
        yield recorder.launches
    finally:
        _recorder.reset(token)


def target_of(x: torch.Tensor) -> Target | None:
    """The chip whose Triton bodies take this tensor; None where the CPU's bodies do."""
    if x.is_cuda:
        return _device_target(x.device.index or 0)
    if x.is_meta:
        recorder = _recorder.get()
        return None if recorder is None else recorder.target
    return INTERPRETER if INTERPRETS else None


def runs_triton(x: torch.Tensor) -> bool:
    """Whether Triton's bodies take this tensor: on a GPU, under `recording`, or under TRITON_INTERPRET=1."""
    return target_of(x) is not None


@functools.cache
def _device_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = str(properties.gcnArchName).split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return Target(arch, properties.multi_processor_count, properties.name.replace(" ", "_"))


def select_tile(target: Target, operation: str, num_tokens: int) -> Tile:
    """The first tile of the operation that serves this many tokens."""
    for tile in tiles(target, operation):
        if tile.max_tokens is None or num_tokens <= tile.max_tokens:
            return tile
    raise ConfigError(f"tiles: {operation} has no tile for {num_tokens} tokens on {target.arch}")


def tiles(target: Target, operation: str) -> tuple[Tile, ...]:
    """Every tile that `select_tile` may choose for an operation on a chip, in order of max_tokens."""
    table = _tile_table(target.arch, target.name, os.environ.get(TILES_VARIABLE))
    if operation not in table:
        raise ConfigError(f"tiles: no entry for {operation} on {target.arch}")
    return table[operation]


def token_classes(target: Target, max_tokens: int) -> list[int]:
    """Token counts up to `max_tokens` of which every tile of every operation serves at least one."""
    table = _tile_table(target.arch, target.name, os.environ.get(TILES_VARIABLE))
    limits = {tile.max_tokens for entries in table.values() for tile in entries if tile.max_tokens}
    return sorted({limit for limit in limits if limit < max_tokens} | {1, max_tokens})


@functools.cache
def _tile_table(arch: str, name: str, override: str | None) -> dict[str, tuple[Tile, ...]]:
    entries = _read_tiles(TILES_DIRECTORY / f"{_table_arch(arch)}.json")
    own = TILES_DIRECTORY / f"{name}.json"
    if name and own.exists():
        entries |= _read_tiles(own)
    if override:
        entries |= _read_tiles(Path(override))
    return entries


def _table_arch(arch: str) -> str:
    """The chip whose table serves: itself, or the newest older one of its vendor."""
    if arch == "interpreter":
        return arch
    known = [known for known in TARGETS if known.startswith(arch[:2])]
    if not arch.startswith("sm_"):
        return arch if arch in known else "gfx942"
    number = int(arch.removeprefix("sm_"))
    older = [known for known in known if int(known.removeprefix("sm_")) <= number]
    if not older:
        raise ConfigError(
            f"device: {arch} is older than {known[0]}, the oldest that is supported; use --device cpu"
        )
    return max(older, key=lambda known: int(known.removeprefix("sm_")))


def _read_tiles(path: Path) -> dict[str, tuple[Tile, ...]]:
    try:
        operations = json.loads(path.read_text())
        return {
            operation: tuple(_read_tile(entry) for entry in entries)
            for operation, entries in operations.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"tiles: {path} cannot be read ({type(error).__name__}: {error})") from error


def _read_tile(entry: dict[str, Any]) -> Tile:
    sizes = {key: value for key, value in entry.items() if key.isupper()}
    return Tile(sizes, entry["num_warps"], entry["num_stages"], entry.get("max_tokens"))


def launch(
    kernel: Any,
    grid: Sequence[int],
    arguments: Mapping[str, Any],
    tile: Tile,
    **constants: Any,
) -> None:
    """Launches a Triton kernel, or records the launch.

    Args:
        arguments: Tensors (or None) and integers by the kernel's names, in its order.
        constants: constexpr arguments beside the tile's sizes.
    """
    constants = {**tile.sizes, **constants}
    recorder = _recorder.get()
    if recorder is not None:
        recorder.launches.add(_describe(recorder.target, kernel, arguments, tile, constants))
        return
    kernel[tuple(grid)](
        **arguments,
        **constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=False,
    )


class CompilationCounter:
    """Counts the kernels that Triton compiles, or loads from its cache on disk, from now on.

    While an engine serves there should be none: its start has compiled every kernel that it can launch.

    Args:
        target: What the engine launches on; None where nothing can be compiled.
    """

    def __init__(self, target: Target | None) -> None:
        self.count = 0
        if target is not None:
            from triton import knobs

            knobs.runtime.jit_post_compile_hook = self._note

    def _note(self, **_: Any) -> None:
        self.count += 1


_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def _describe(
    target: Target, kernel: Any, arguments: Mapping[str, Any], tile: Tile, constants: dict[str, Any]
) -> Launch:
    unspecialized = {
        kernel.params[i].name for i in range(len(kernel.params)) if kernel.params[i].do_not_specialize
    }
    types, aligned, large = [], [], []
    constants = dict(constants)
    for name, value in arguments.items():
        if value is None or (value is True or value is False):
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            types.append((name, f"*{_TYPES[value.dtype]}"))
            # The offset into the storage stands for the address: allocations are aligned.
            if value.storage_offset() * value.itemsize % 16 == 0:
                aligned.append(name)
            if not target.is_nvidia and value.untyped_storage().nbytes() >= 2**31:
                large.append(name)
        elif isinstance(value, float):
            types.append((name, "fp32"))
        elif value == 1 and name not in unspecialized:
            constants[name] = 1
        else:
            types.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0 and name not in unspecialized:
                aligned.append(name)
    return Launch(
        kernel,
        kernel.__name__,
        tuple(types),
        tuple(aligned),
        tuple(large),
        tuple(sorted(constants.items())),
        tile.num_warps,
        tile.num_stages,
    )
