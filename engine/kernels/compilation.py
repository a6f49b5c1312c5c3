"""Compiling launches for a chip that need not be there, and what each compiled kernel takes of it.

`python -m engine.kernels.compile` does it for every kernel that the engine can launch for a model.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from engine.errors import ConfigError
from engine.kernels.launch import TARGETS, Launch

SHARED_LIMITS = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}
"""KiB of shared memory that one block may have.

CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA 3 ISA guide, "LDS".
"""

TENSOR_MEMORY_LIMIT = 512
"""Columns of Blackwell's tensor memory."""


@dataclasses.dataclass(frozen=True, slots=True)
class Resources:
    """What one compiled kernel takes, counted in its machine code.

    Attributes:
        registers: 32-bit (vector) registers of a thread.
        stack_bytes: Local memory (NVIDIA's stack, AMD's scratch) of a thread.
        spills: Loads and stores of local memory (NVIDIA: LDL, STL); spilled vector registers (AMD).
        scalar_spills: Scalar registers kept in lanes of vector ones (AMD): costs instructions, no memory.
        shared_bytes: Shared memory of a block.
        tensor_memory: Columns of tensor memory of a block (sm_100).
        matrix_instructions: Multiplications of tiles, e.g. HMMA, HGMMA, UTCHMMA, v_mfma.
        wide_loads: Loads from global memory of 16 bytes a thread or more, those straight to shared memory too.
        narrow_loads: The other loads from global memory.
        bulk_loads: Tiles copied by the TMA unit.
    """

    registers: int
    stack_bytes: int
    spills: int
    scalar_spills: int
    shared_bytes: int
    tensor_memory: int
    matrix_instructions: int
    wide_loads: int
    narrow_loads: int
    bulk_loads: int


@dataclasses.dataclass(frozen=True, slots=True)
class CompiledLaunch:
    """A launch compiled for a chip.

    Attributes:
        key: Triton's own name for the compiled kernel, under which its disk cache keeps it.
        code: The cubin (NVIDIA) or the assembly (AMD).
        shared_bytes, tensor_memory: As in `Resources`.
    """

    arch: str
    key: str
    code: bytes
    shared_bytes: int
    tensor_memory: int


@dataclasses.dataclass(frozen=True, slots=True)
class Examination:
    """A compiled launch's resources (None where it does not compile) and what speaks against launching it."""

    resources: Resources | None
    problems: list[str]


def compile_launch(launch: Launch, arch: str) -> CompiledLaunch:
    """Compiles a recorded launch, or takes it from Triton's disk cache.

    The kernel is stored under the key that the launch itself looks up on the chip: a launch compiled here is
    not compiled there. An AMD launch also depends on which tensors lie within 2 GiB; all are taken to.

    Raises:
        ConfigError: The chip is unknown, or Triton's interpreter stands in for its compiler.
        Exception: What Triton raises for a kernel that it cannot compile.
    """
    check_arch(arch)
    compiled = _compile(launch, gpu_target(arch))
    is_nvidia = TARGETS[arch].is_nvidia
    return CompiledLaunch(
        arch,
        compiled.hash,
        compiled.asm["cubin"] if is_nvidia else compiled.asm["amdgcn"].encode(),
        compiled.metadata.shared,
        compiled.metadata.tmem_size if is_nvidia else 0,
    )


def gpu_target(arch: str) -> GPUTarget:
    """Triton's name for a chip."""
    if TARGETS[arch].is_nvidia:
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64)


def resources_of(compiled: CompiledLaunch) -> Resources:
    """Counts in the machine code; on NVIDIA this takes about half a second, the time to disassemble."""
    return _nvidia_resources(compiled) if TARGETS[compiled.arch].is_nvidia else _amd_resources(compiled)


def problems(compiled: CompiledLaunch) -> list[str]:
    """Why a compiled kernel must not be launched: it spills registers, or the chip lacks the memory."""
    found = []
    is_nvidia = TARGETS[compiled.arch].is_nvidia
    # Without a stack there is no need to disassemble; and one that is never loaded or stored costs nothing.
    if not is_nvidia or _stack_bytes(_cuobjdump(compiled, "-res-usage")):
        resources = resources_of(compiled)
        if resources.spills or (resources.stack_bytes and not is_nvidia):
            found.append(
                f"spills: {resources.spills}, {resources.stack_bytes} bytes a thread, "
                f"with {resources.registers} registers"
            )
    limit = SHARED_LIMITS[compiled.arch]
    if compiled.shared_bytes > limit * 1024:
        found.append(f"shared memory: {compiled.shared_bytes / 1024:.1f} KiB of {limit}")
    if compiled.tensor_memory > TENSOR_MEMORY_LIMIT:
        found.append(f"tensor memory: {compiled.tensor_memory} columns of {TENSOR_MEMORY_LIMIT}")
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class PortableLaunch:
    """A launch that can be sent to another process: a kernel by its name, which cannot be sent itself."""

    launch: Launch
    module: str

    @classmethod
    def of(cls, launch: Launch) -> PortableLaunch:
        return cls(dataclasses.replace(launch, kernel=None), launch.kernel.fn.__module__)

    def restore(self) -> Launch:
        kernel = getattr(importlib.import_module(self.module), self.launch.name)
        return dataclasses.replace(self.launch, kernel=kernel)


def compile_launches(
    launches: Iterable[Launch], arch: str, jobs: int
) -> Iterator[tuple[Launch, Examination]]:
    """Compiles launches in `jobs` processes and yields each as it is done.

    Kernels must be found in their modules by name.
    """
    check_arch(arch)
    if jobs < 1:
        raise ConfigError(f"jobs must be at least 1, got {jobs}")
    # Spawned: a fork would share the locks of torch's threads.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        pending = {pool.submit(_examine, PortableLaunch.of(launch), arch): launch for launch in launches}
        for done in as_completed(pending):
            try:
                yield pending[done], done.result()
            except BrokenProcessPool:
                yield (
                    pending[done],
                    Examination(None, ["a compiling process died, on this kernel or another"]),
                )


def _examine(launch: PortableLaunch, arch: str) -> Examination:
    try:
        compiled = compile_launch(launch.restore(), arch)
    except Exception as error:  # Triton's errors share no base and some cannot be sent to another process
        return Examination(None, [f"{type(error).__name__}: {error}".strip()])
    return Examination(resources_of(compiled), problems(compiled))


def check_arch(arch: str) -> None:
    if arch not in TARGETS:
        raise ConfigError(f"arch must be one of {', '.join(TARGETS)}, got {arch!r}")
    if knobs.runtime.interpret:
        raise ConfigError("TRITON_INTERPRET=1 replaces the compiler: unset it to compile kernels")


def _compile(launch: Launch, target: GPUTarget) -> Any:
    """Triton's CompiledKernel. The kernel itself turns specializations into a signature, as in a launch."""
    kernel, types, constants = launch.kernel, dict(launch.arguments), dict(launch.constants)
    backend = make_backend(target)
    values: dict[str, Any] = {}
    specialization: list[tuple[str, Any]] = []
    for parameter in kernel.params:
        name = parameter.name
        if name in types:
            values[name] = None
            specialization.append((types[name], _specialization(launch, parameter, types[name], target)))
        else:
            values[name] = constants.get(name, parameter.default)
            specialization.append(("constexpr", values[name]))
    options, signature, constexprs, attributes = kernel._pack_args(
        backend,
        {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": False},
        values,
        specialization,
        None,
    )
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def _specialization(launch: Launch, parameter: Any, type: str, target: GPUTarget) -> str | None:
    """Triton's letters for an argument: D, divisible by 16; S, a tensor within 2 GiB (AMD)."""
    is_pointer = type.startswith("*")
    if parameter.do_not_specialize or not (is_pointer or type.startswith("i")):
        return None
    aligned = "D" if parameter.name in launch.aligned else ""
    is_small = is_pointer and target.backend == "hip" and parameter.name not in launch.large
    return aligned + ("S" if is_small else "")


def _cuobjdump(compiled: CompiledLaunch, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.code)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _stack_bytes(text: str) -> int:
    return _largest(r"STACK:(\d+)", text) + _largest(r"LOCAL:(\d+)", text)


def _nvidia_resources(compiled: CompiledLaunch) -> Resources:
    text = _cuobjdump(compiled, "-res-usage", "-sass")
    # A line of it: /*0fb0*/ @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
    opcodes = [
        opcode.split(".") for opcode in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", text)
    ]
    loads = [opcode for opcode in opcodes if opcode[0] in ("LDG", "LDGSTS")]
    wide = sum("128" in opcode or "256" in opcode for opcode in loads)
    return Resources(
        registers=_largest(r"REG:(\d+)", text),
        stack_bytes=_stack_bytes(text),
        spills=sum(opcode[0] in ("LDL", "STL") for opcode in opcodes),
        scalar_spills=0,
        shared_bytes=compiled.shared_bytes,
        tensor_memory=compiled.tensor_memory,
        matrix_instructions=sum(opcode[0].endswith("MMA") for opcode in opcodes),
        wide_loads=wide,
        narrow_loads=len(loads) - wide,
        bulk_loads=sum(opcode[0] == "UTMALDG" for opcode in opcodes),
    )


def _amd_resources(compiled: CompiledLaunch) -> Resources:
    text = compiled.code.decode()
    loads = re.findall(r"^\s+(?:global|buffer|flat)_load_\w+", text, re.MULTILINE)
    wide = sum(load.endswith("dwordx4") for load in loads)
    return Resources(
        registers=_largest(r"\.vgpr_count:\s+(\d+)", text),
        stack_bytes=_largest(r"\.private_segment_fixed_size:\s+(\d+)", text),
        spills=_largest(r"\.vgpr_spill_count:\s+(\d+)", text),
        scalar_spills=_largest(r"\.sgpr_spill_count:\s+(\d+)", text),
        shared_bytes=compiled.shared_bytes,
        tensor_memory=compiled.tensor_memory,
        matrix_instructions=len(re.findall(r"^\s+v_mfma_", text, re.MULTILINE)),
        wide_loads=wide,
        narrow_loads=len(loads) - wide,
        bulk_loads=0,
    )


def _largest(pattern: str, text: str) -> int:
    """The largest number that the pattern finds; the pattern is there once a function."""
    return max(int(number) for number in re.findall(pattern, text))
