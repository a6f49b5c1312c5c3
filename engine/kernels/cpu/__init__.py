"""The kernels' C bodies: built once a machine by its own compiler, absent where it has none.

torch's extension loader takes 40 s for what a C compiler does in one, since it compiles torch's headers; these
functions take pointers and sizes and need none of them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from engine.cache_directory import cache_directory

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
SEGMENT = 256
"""Positions that decode attention takes at once; segments are combined in order."""

FLAGS = (
    "-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC", f"-DSEGMENT={SEGMENT}",
)  # fmt: skip

_POINTER, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "int8_matmul": [_POINTER] * 7 + [_SIZE] * 3,
    "rms_norm": [_POINTER] * 3 + [_FLOAT] + [_SIZE] * 2,
    "rotary_write_kv": [_POINTER] * 5 + [_SIZE] * 5,
    "decode_attention": [_POINTER] * 8 + [_FLOAT] + [_SIZE] * 9,
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there is no C compiler ($CC, or cc)."""
    name = os.environ.get("CC", "cc")
    compiler = shutil.which(name)
    if compiler is None:
        logger.info("no C compiler (%s): torch's operators serve, slower at a few tokens a step", name)
        return None
    try:
        loaded = ctypes.CDLL(str(_build(compiler)))
    except (subprocess.CalledProcessError, OSError) as error:
        cause = getattr(error, "stderr", None) or error
        logger.warning("%s could not build the CPU kernels, torch's operators serve: %s", compiler, cause)
        return None
    for name, types in _SIGNATURES.items():
        getattr(loaded, name).argtypes = types
    return loaded


def serves(*tensors: torch.Tensor) -> bool:
    """Whether the C bodies take these tensors, once contiguous: float32 on the CPU, and there is a library."""
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors) and library() is not None


def _build(compiler: str) -> Path:
    """Compiles into the user's cache, once for a source, compiler and processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "flags" in line), "")
    key = hashlib.blake2b(
        SOURCE.read_bytes() + version + cpu.encode() + " ".join(FLAGS).encode(), digest_size=16
    )
    directory = cache_directory() / "kernels"
    path = directory / f"{key.hexdigest()}.so"
    if path.exists():
        return path
    directory.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=directory, suffix=".partial")
    os.close(handle)
    try:
        command = [compiler, *FLAGS, "-o", temporary, str(SOURCE), "-lm"]
        subprocess.run(command, capture_output=True, check=True, text=True)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path
