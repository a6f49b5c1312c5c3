"""The kernels' C bodies: built once a machine by its own compiler, absent where it has none.

A compiler builds them in seconds, where torch's extension loader would take a minute for torch's headers: they take
addresses and sizes. They run on threads of their own (pool.c), since what waits for a thread that is not running
waits long; torch's threads sleep meanwhile.

`run` checks and calls an operation: operations.h lists what each takes. Under `Program.recording` the call is noted
instead, so that a model's whole step becomes a list of calls with fixed addresses, which one call then runs:
`Program.run`. What differs from step to step, how many rows there are among it, is read from memory.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import logging
import math
import os
import shlex
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine.cache_directory import cache_directory, is_private
from engine.errors import ConfigError, EngineError
from engine.kernels.cpu.signatures import Argument, Operation, read_operations

logger = logging.getLogger(__name__)

SOURCES = sorted(Path(__file__).parent.glob("*.c"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))

LINE = 64
"""Bytes that memory is moved in: what starts at a multiple of them is read fastest."""

FLAGS = (
    "-O3", "-mprefer-vector-width=512", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-fno-strict-aliasing", "-Wno-psabi", "-Werror=incompatible-pointer-types", "-Werror=int-conversion",
    "-pthread", "-shared", "-fPIC",
)  # fmt: skip

_AVX512 = ("-march=x86-64-v4", "-mavx512vnni")
_AMX = ("-mamx-tile", "-mamx-int8")


@dataclass(frozen=True, slots=True)
class Level:
    """An instruction set to build for.

    Attributes:
        flags: The compiler's.
        needs: What the processor must name among its flags.
    """

    flags: tuple[str, ...]
    needs: frozenset[str]


EMULATED = "amx-emulated"
"""Tests the code for AMX on machines without it."""

LEVELS = {
    "amx": Level((*_AVX512, *_AMX), frozenset({"amx_int8", "amx_tile", "avx512_vnni"})),
    "vnni": Level(_AVX512, frozenset({"avx512_vnni", "avx512bw", "avx512dq", "avx512vl"})),
    "avx2": Level(("-march=x86-64-v3",), frozenset({"avx2", "fma", "f16c"})),
    "portable": Level(("-march=native",), frozenset()),
    EMULATED: Level((*_AVX512, "-DEMULATE_TILES"), frozenset({"avx512_vnni"})),
}
"""Levels by name, the best first; `$ENGINE_CPU_KERNELS` takes one of them, or "torch" for torch's operators."""

VARIABLE = "ENGINE_CPU_KERNELS"

FUNCTIONS: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "enable_tiles": (ctypes.c_int, ()),
    "create_pool": (ctypes.c_void_p, (ctypes.c_int64,)),
    "drain_pool": (None, (ctypes.c_void_p,)),
    "pool_progress": (ctypes.c_int64, (ctypes.c_void_p,)),
    "run_calls": (None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)),
    "begin_turn": (None, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)),
    "await_turn": (ctypes.c_int64, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)),
}
"""What of the library is called beside its operations: what each returns and takes."""


@dataclass(frozen=True, slots=True)
class Library:
    """The loaded kernels.

    Attributes:
        functions: Those of `FUNCTIONS`.
        level: A key of `LEVELS`.
        operations: By name.
    """

    functions: ctypes.CDLL
    level: str
    operations: dict[str, Operation]


@functools.cache
def library() -> Library | None:
    """The compiled kernels, or None where there is no C compiler ($CC, or cc), or torch is asked for.

    Raises:
        ConfigError: $ENGINE_CPU_KERNELS names what there is not.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "torch":
        return None
    if wanted and wanted not in LEVELS:
        raise ConfigError(f"{VARIABLE} must be torch or one of {', '.join(LEVELS)}, got {wanted!r}")
    flags = processor_flags()
    if wanted and (missing := ", ".join(sorted(LEVELS[wanted].needs - flags))):
        raise ConfigError(f"{VARIABLE}={wanted}: this processor lacks {missing}")
    # As make takes it: a program with arguments ("ccache cc").
    command = shlex.split(os.environ.get("CC") or "cc")
    program = shutil.which(command[0]) if command else None
    if program is None:
        logger.warning("there is no C compiler %s", " ".join(command))
        return None
    compiler = [program, *command[1:]]
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    except (subprocess.CalledProcessError, OSError) as error:
        logger.warning("%s could not build the CPU kernels: %s", shlex.join(compiler), error)
        return None
    usable = [name for name, level in LEVELS.items() if level.needs <= flags and name != EMULATED]
    for name in [wanted] if wanted else usable:
        functions = _load(compiler, version, name)
        if functions is not None:
            return Library(functions, name, read_operations(functions))
    return None


def _load(compiler: list[str], version: bytes, name: str) -> ctypes.CDLL | None:
    """The kernels of a level; None where compiler or system cannot do it."""
    try:
        functions = ctypes.CDLL(str(_build(compiler, version, LEVELS[name])))
    except (subprocess.CalledProcessError, OSError) as error:
        cause = (getattr(error, "stderr", None) or str(error)).strip()
        logger.warning("%s could not build the CPU kernels for %s: %s", shlex.join(compiler), name, cause)
        return None
    for function, (returned, taken) in FUNCTIONS.items():
        getattr(functions, function).restype, getattr(functions, function).argtypes = returned, taken
    if functions.enable_tiles() != 0:
        logger.warning("the system refuses the tile registers that CPU kernels for %s need", name)
        return None
    return functions


@functools.cache
def processor_flags() -> frozenset[str]:
    """What the processor can do, as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def describe() -> str:
    """The kernels in one line, with the remedy where they are not there."""
    loaded = library()
    if loaded is not None:
        return f"C kernels for {loaded.level}"
    return (
        "torch's operators, which are slower, and whose results depend on how a prompt was cut into chunks: "
        f"install a C compiler (gcc 11 or newer) or set CC, and unset {VARIABLE}"
    )


def serves(*tensors: torch.Tensor) -> bool:
    """Whether the C bodies take these tensors: float32 on the CPU, and there is a library."""
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors) and library() is not None


def packs(weight: torch.Tensor) -> bool:
    """Whether the C bodies take a weight: as `serves`, and one on the meta device if they will take it on the CPU."""
    is_here = weight.device.type in ("cpu", "meta")
    return is_here and weight.dtype == torch.float32 and library() is not None


def _build(compiler: list[str], version: bytes, level: Level) -> Path:
    """Compiles into the user's cache, once for a source, compiler and processor."""
    flags = [*level.flags, *FLAGS]
    key = hashlib.blake2b(version + " ".join(flags).encode(), digest_size=16)
    if "-march=native" in flags:
        key.update(" ".join(sorted(processor_flags())).encode())
    for file in SOURCES + HEADERS:
        key.update(file.read_bytes())
    directory = _private_directory(cache_directory() / "kernels")
    path = directory / f"{key.hexdigest()}.so"
    if path.exists() and is_private(path):
        if _is_whole(path):
            return path
        logger.warning("%s is damaged and is built again", path)
    if shutil.disk_usage(directory).free < _BUILD_BYTES:
        path = _temporary_directory(directory, "there is no space left") / path.name
        directory = path.parent
    handle, temporary = tempfile.mkstemp(dir=directory, suffix=".partial")
    os.close(handle)
    start = time.perf_counter()
    logger.info("building the CPU kernels with %s (once)", shlex.join(compiler))
    try:
        command = [*compiler, *flags, "-o", temporary, *map(str, SOURCES), "-lm"]
        subprocess.run(command, capture_output=True, check=True, text=True)
        os.chmod(temporary, 0o700)
        with open(temporary, "rb") as built:
            os.fsync(built)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    logger.info("built the CPU kernels in %.1f s", time.perf_counter() - start)
    return path


def _is_whole(path: Path) -> bool:
    """Whether a library ends where its section headers do (elf(5)): the loader dies of one that was cut off."""
    data = path.read_bytes()
    if len(data) < _ELF_HEADER.size:
        return False
    magic, start, size, number = _ELF_HEADER.unpack_from(data)
    return bool(magic == b"\x7fELF" and len(data) >= start + size * number)


_ELF_HEADER = struct.Struct("<4s36xQ10xHH2x")
"""Magic number, then offset, size of each and number of the section headers, in files of 64 bits."""

_BUILD_BYTES = 2**22
"""More than the kernels of a level take."""


def _private_directory(directory: Path) -> Path:
    """The directory, which only this user can write to; else a temporary one, for this process alone."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if directory.stat().st_uid == os.geteuid():
            directory.chmod(0o700)
        if is_private(directory) and os.access(directory, os.W_OK):
            return directory
        reason = "it is not this user's alone"
    except OSError as error:
        reason = str(error.strerror)
    return _temporary_directory(directory, reason)


def _temporary_directory(directory: Path, reason: str) -> Path:
    logger.warning(
        "%s: CPU kernels cannot be kept there (%s): they are built for each start; name another directory with "
        "LLM_ENGINE_CACHE",
        directory,
        reason,
    )
    temporary = tempfile.TemporaryDirectory(prefix="llm-engine-")
    atexit.register(temporary.cleanup)
    return Path(temporary.name)


_pools: dict[tuple[int, int], int] = {}
"""Addresses of pools by number of threads and process: one that was forked needs its own."""


def _pool(num_threads: int, process: int) -> int:
    """The address of a process's pool of threads."""
    if (num_threads, process) in _pools:
        return _pools[num_threads, process]
    loaded = library()
    assert loaded is not None
    address: int | None = loaded.functions.create_pool(num_threads)
    if address is None:
        raise EngineError(f"the system refuses {num_threads} threads; lower num_threads")
    _pools[num_threads, process] = address
    return address


def progress() -> tuple[int, ...]:
    """What is another value when a thread of this process's pools has taken a task meanwhile. Any thread may ask."""
    own = [address for (_, process), address in list(_pools.items()) if process == os.getpid()]
    if not own:
        return ()
    loaded = library()
    assert loaded is not None
    return tuple(loaded.functions.pool_progress(address) for address in own)


class _Call(ctypes.Structure):
    _fields_ = (("operation", ctypes.c_void_p), ("words", ctypes.c_void_p))


class Program:
    """Calls with fixed addresses, run one after the other. Threads that run programs take turns.

    Args:
        num_threads: The calling one and others.

    Attributes:
        names: The operation of each call.
    """

    def __init__(self, num_threads: int) -> None:
        loaded = library()
        assert loaded is not None
        self._library, self._num_threads = loaded, num_threads
        self.names: list[str] = []
        self._kept: list[object] = []
        self._calls: list[_Call] = []
        self._buffers: dict[tuple[str, tuple[int, ...], torch.dtype], torch.Tensor] = {}
        self._num_rows: torch.Tensor | None = None
        self._array: ctypes.Array[_Call] | None = None
        # Functions of Python, each with the number of calls before it.
        self._breaks: list[tuple[int, Callable[[], None]]] = []
        # Where each recording began among calls and functions.
        self._parts: list[tuple[int, int]] = []

    def __del__(self) -> None:
        # A thread that is behind may still read the calls.
        self._library.functions.drain_pool(self._pool)

    @property
    def _pool(self) -> int:
        return _pool(self._num_threads, os.getpid())

    @contextmanager
    def recording(self, num_rows: torch.Tensor) -> Iterator[None]:
        """`run` adds to the program within this context.

        Args:
            num_rows: [1] int64, whose value, when the program runs, is the number of rows of the operations.
        """
        self._num_rows = num_rows
        self._parts.append((len(self._calls), len(self._breaks)))
        token = _recorded.set(self)
        try:
            yield
        finally:
            _recorded.reset(token)

    def add(self, name: str, /, num_rows: torch.Tensor, **arguments: Argument) -> None:
        """Adds a call of an operation; the tensors are kept.

        Args:
            num_rows: [1] int64, read when the program runs.
            arguments: Those that operations.h lists.

        Raises:
            TypeError: An argument is missing, unknown, or not what the operation takes.
        """
        operation = self._library.operations[name]
        arguments["num_rows"] = num_rows
        words = operation.words(arguments)
        self._kept += [*arguments.values(), words]
        self.names.append(name)
        self._calls.append(_Call(operation.address, ctypes.addressof(words)))
        self._array = None

    def add_function(self, num_rows: torch.Tensor, function: Callable[[int], None]) -> None:
        """Adds a function of Python, which gets the number of rows that there are when the program runs."""
        self._breaks.append((len(self._calls), lambda: function(int(num_rows))))

    def buffer(self, owner: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory for what an operation writes: the same one whenever it asks for such."""
        key = (owner, tuple(shape), dtype)
        if key not in self._buffers:
            self._buffers[key] = _zeros(key[1], dtype)
        return self._buffers[key]

    def run(self, seconds: torch.Tensor | None = None, part: int = 0) -> None:
        """Runs the calls.

        Args:
            seconds: [calls] float64, to which the duration of each is added.
            part: The first recording whose calls are run.
        """
        if self._array is None:
            self._array = (_Call * len(self._calls))(*self._calls)
        start, first_break = self._parts[part] if part else (0, 0)
        for end, function in self._breaks[first_break:]:
            self._run(start, end, seconds)
            function()
            start = end
        self._run(start, len(self._calls), seconds)

    def _run(self, start: int, end: int, seconds: torch.Tensor | None) -> None:
        """Runs the calls from start … end - 1."""
        if start == end:
            return
        assert self._array is not None
        address = ctypes.addressof(self._array) + start * ctypes.sizeof(_Call)
        durations = None if seconds is None else seconds[start:].data_ptr()
        self._library.functions.run_calls(self._pool, address, end - start, durations)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take no memory before they are touched: numpy has the system make them, where torch writes them."""
    size = math.prod(shape) * dtype.itemsize
    block = torch.from_numpy(np.zeros(size + LINE, np.uint8))
    start = -block.data_ptr() % LINE
    return block[start : start + size].view(dtype).view(shape)


_recorded: ContextVar[Program | None] = ContextVar("recorded", default=None)


def run(name: str, num_rows: int | torch.Tensor, num_threads: int = 1, /, **arguments: Argument) -> None:
    """Calls an operation of the C sources, or adds it to the program that is recorded.

    Args:
        num_rows: A number, which stands for the program's own while one is recorded, or [1] int64.
        num_threads: Of a call, this one among them; a program has its own.
        arguments: Those that operations.h lists.

    Raises:
        TypeError: An argument is missing, unknown, or not what the operation takes.
    """
    program = _recorded.get()
    if program is None:
        _run_now(name, num_rows, num_threads, arguments)
        return
    if isinstance(num_rows, int):
        assert program._num_rows is not None
        num_rows = program._num_rows
    program.add(name, num_rows, **arguments)


def _run_now(
    name: str, num_rows: int | torch.Tensor, num_threads: int, arguments: dict[str, Argument]
) -> None:
    """A program of one call, without the objects of one: a step has a few of them."""
    loaded = library()
    assert loaded is not None
    operation, functions = loaded.operations[name], loaded.functions
    rows = torch.from_numpy(np.array([num_rows])) if isinstance(num_rows, int) else num_rows
    words = operation.words({"num_rows": rows, **arguments})
    call = _Call(operation.address, ctypes.addressof(words))
    pool = _pool(num_threads, os.getpid())
    functions.run_calls(pool, ctypes.addressof(call), 1, None)
    # A thread that is behind may still read the call.
    functions.drain_pool(pool)


def call(function: Callable[[int], None], num_rows: int) -> None:
    """Calls a function of Python with a number of rows, or adds it to the program that is recorded; it then gets the
    program's own number.
    """
    program = _recorded.get()
    if program is None:
        function(num_rows)
        return
    assert program._num_rows is not None
    program.add_function(program._num_rows, function)


def empty(owner: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Memory for an operation's result. In a program an owner gets the same memory each time that it asks for this
    shape: its result must have been used by then.
    """
    program = _recorded.get()
    return torch.empty(shape, dtype=dtype) if program is None else program.buffer(owner, shape, dtype)
