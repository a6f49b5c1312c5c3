"""What a result was measured on and with, so that a number can be read without its author."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

# The instruction sets that decide how fast small matrices multiply.
_NOTABLE_CPU_FLAGS = frozenset(
    {
        "avx2",
        "avx_vnni",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "amx_int8",
        "amx_bf16",
        "asimddp",
        "i8mm",
        "sve",
    }
)
_PACKAGES = ("torch", "triton", "transformers", "llm-engine")


def _cpu() -> tuple[str, list[str]]:
    """Model name and notable instruction sets of the CPU, as far as the system tells."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    except OSError:
        pass  # not Linux
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    model = fields.get("model name") or platform.processor() or platform.machine()
    return model, sorted(flags & _NOTABLE_CPU_FLAGS)


def _gpus() -> list[str]:
    """Names, memory and driver of the NVIDIA GPUs; asking the driver's tool spares importing torch."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.strip().splitlines() if answer.returncode == 0 else []


def _package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def describe_machine() -> dict[str, Any]:
    """The machine this process runs on, as JSON values; memory in bytes."""
    cpu, flags = _cpu()
    return {
        "cpu": cpu,
        "cpu_flags": flags,
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_average": list(os.getloadavg()),
        "gpus": _gpus(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _package_version(name))},
    }


def _commit() -> str | None:
    """The commit that runs, with a + where files differ from it; None outside of a repository."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        answer = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return None  # no git
    return answer.stdout.strip() if answer.returncode == 0 else None


def describe_run(arguments: Sequence[str]) -> dict[str, Any]:
    """When, of which commit, with which arguments and on what a benchmark runs; the value of --api-key is masked."""
    shown = list(arguments)
    for position, word in enumerate(arguments):
        if word.startswith("--api-key="):
            shown[position] = "--api-key=***"
        elif word == "--api-key" and position + 1 < len(arguments):
            shown[position + 1] = "***"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "arguments": shown,
        "machine": describe_machine(),
    }
