"""EngineConfig: every option of the engine, validated once, in one place."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, fields
from functools import cache
from numbers import Integral, Real
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from engine.errors import ConfigError
from engine.quant_spec import CHOICES, QuantSpec, parse_quant_spec

DataType = Literal["auto", "float32", "bfloat16", "float16"]
CacheType = Literal["auto", "float32", "bfloat16", "float16", "int8", "int4", "fp8_e4m3"]
Device = Literal["auto", "cpu", "cuda"]
LoadFormat = Literal["auto", "dummy"]
ExecutorBackend = Literal["mp", "ray"]
ToolFormatName = Literal[
    "auto", "prompt", "hermes", "llama3_json", "mistral", "mistral_v11", "gemma4", "functiongemma", "deepseek_v3",
    "deepseek_v31", "harmony", "pythonic", "lfm2",
]  # fmt: skip
ReasoningFormatName = Literal["auto", "none", "think", "mistral", "gemma4", "harmony"]

MAX_STEP_SLOWDOWN = 4.0
"""How many times as long as without its prompts a step takes at most: three quarters of it are the prompts' then."""

_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(text: str | int, option: str = "kv_cache_memory") -> int:
    """``"512MiB"`` → 536870912; a plain number counts bytes.

    Raises:
        ConfigError: It is no size; names the option.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(text).strip())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f"{option}: {text!r} is not a size; write it like 512MiB or 4GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def format_bytes(count: int) -> str:
    """536870912 → ``"512.0 MiB"``."""
    for unit in ("GiB", "MiB", "KiB"):
        if count >= _UNITS[unit]:
            return f"{count / _UNITS[unit]:.1f} {unit}"
    return f"{count} B"


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Options of an engine. `serve` takes each with dashes, `LLM` with underscores."""

    model: str = _option("llama", "alias (llama, gemma), directory, .gguf file or Hugging Face repository id")
    quant: str = _option(
        "auto",
        f"how weights are stored and multiplied: {', '.join(CHOICES)}, with words (int4:g128, int8:g32) "
        "and other schemes for some modules (int4,*.down_proj=int8); auto: as the checkpoint's are if quantized, "
        "else none",
    )
    dtype: DataType = _option(
        "auto", "type of activations; auto is float32 on a CPU and the checkpoint's own type on a GPU"
    )
    load_format: LoadFormat = _option(
        "auto",
        "dummy fills the model of any config.json with random weights, to measure speed without its own",
    )
    device: Device = _option("auto", "where the model runs; auto takes a GPU if there is one")
    tensor_parallel_size: int = _option(1, "ranks that share every layer, a process each")
    pipeline_parallel_size: int = _option(1, "stages of layers, each of tensor_parallel_size ranks")
    distributed_executor_backend: ExecutorBackend = _option(
        "mp",
        "where ranks run: mp, processes of this machine; ray, actors on the nodes that ray start has joined",
    )
    exact_reduce: bool = _option(
        True,
        "ranks compute the bits that one would, whatever their number; without, their float products are summed",
    )
    symmetric_memory: bool = _option(
        False,
        "several GPUs of one machine: sum small float tensors through torch's symmetric memory, and capture CUDA "
        "graphs; no machine has run this yet",
    )
    deterministic: bool = _option(
        False,
        "a batch cannot change a token: float products in one form on a GPU; refused where a CPU is not exact",
    )
    overlap: bool | None = _option(
        None, "plan and launch the next step while one runs; default: on a GPU, where it can"
    )
    enforce_eager: bool = _option(False, "launch kernel by kernel, without CUDA graphs")
    num_threads: int | None = _option(
        None, "CPU threads of the model; default: the CPUs this process may use"
    )
    max_model_len: int | None = _option(
        None, "longest sequence, prompt and output; default: the model's, or less if the cache is smaller"
    )
    clip_max_tokens: bool = _option(
        False, "lower a max_tokens that does not fit beside its prompt, instead of refusing the request"
    )
    max_num_seqs: int | None = _option(None, "most sequences in a step; default: 64 on a CPU, 256 on a GPU")
    max_num_batched_tokens: int | None = _option(
        None, "most tokens in a step; default: 512 on a CPU, 4096 on a GPU"
    )
    long_prefill_token_threshold: int | None = _option(
        None, "most tokens of one prompt in a step that others share; default: a quarter of the step"
    )
    max_step_ms: float | None = _option(
        None,
        "longest time of a step that computes prompts beside sequences that decode, in milliseconds; default: 4 "
        "times what it would take without the prompts; none where a token depends on how its prompt is cut",
    )
    kv_cache_memory: str | int | None = _option(
        None, "size of the KV cache, e.g. 512MiB; default: a quarter of free memory, 4GiB at most, on a CPU"
    )
    gpu_memory_utilization: float = _option(0.9, "share of a GPU's memory that weights and KV cache may take")
    kv_cache_dtype: CacheType = _option(
        "auto",
        "cached keys and values; auto: the activations' type, int8 (a scale a token and head) on CPUs if quantized",
    )
    block_size: int = _option(16, "tokens in a block of the KV cache, a power of two from 4 to 256")
    enable_prefix_caching: bool = _option(True, "find the blocks of equal prompt prefixes again")
    tool_format: ToolFormatName = _option(
        "auto",
        "how the model writes calls of tools; auto: as its chat template does; prompt: as a system message of ours "
        "tells it to",
    )
    reasoning_format: ReasoningFormatName = _option(
        "auto",
        "the marks around a model's reasoning; auto: those of its chat template; none: it stays in the text",
    )
    max_restarts: int = _option(
        3,
        "how often within --restart-window an engine that has died, or lost a rank, is started again; open requests "
        "go on",
    )
    restart_window: float = _option(600.0, "seconds; see --max-restarts")
    seed: int | None = _option(None, "seed from which requests without one get theirs; default: random")
    cache_dir: str | None = _option(
        None,
        "where parsed weights, merges, joined models and compiled kernels are kept; default: "
        "$XDG_CACHE_HOME/llm-engine",
    )

    def __post_init__(self) -> None:
        for name in option_types():
            _check_type(name, getattr(self, name))
        _ = self.quant_spec  # parses it
        if self.symmetric_memory and self.tensor_parallel_size == 1:
            raise ConfigError("symmetric_memory: is between ranks; give it a --tensor-parallel-size, too")
        for name in (
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "num_threads",
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "long_prefill_token_threshold",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.block_size not in (4, 8, 16, 32, 64, 128, 256):
            raise ConfigError(f"block_size must be a power of two from 4 to 256, got {self.block_size}")
        if self.max_restarts < 0:
            raise ConfigError(f"max_restarts must be at least 0, got {self.max_restarts}")
        if not 0.0 < self.restart_window < float("inf"):
            raise ConfigError(f"restart_window must be above 0, got {self.restart_window}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"gpu_memory_utilization must be above 0 and at most 1, got {self.gpu_memory_utilization}"
            )
        if self.max_step_ms is not None and not self.max_step_ms > 0.0:
            raise ConfigError(f"max_step_ms must be above 0, got {self.max_step_ms}")
        if self.kv_cache_memory is not None:
            parse_bytes(self.kv_cache_memory)

    @property
    def num_ranks(self) -> int:
        """Processes that run the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def batch_invariant_attention(self) -> bool:
        """Whether attention has one form for chunks and decodes: what follows it in the exact path must be exact."""
        return self.deterministic or self.quant_spec.is_exact

    @property
    def quant_spec(self) -> QuantSpec:
        """What `quant` says; floats as long as it is "auto".

        Raises:
            ConfigError: It is not one.
        """
        return parse_quant_spec("none" if self.quant == "auto" else self.quant)

    @property
    def captures_graphs(self) -> bool:
        """Whether steps become CUDA graphs, on a GPU: those of several ranks have not been seen to run."""
        return not self.enforce_eager and (self.num_ranks == 1 or self.symmetric_memory)

    @classmethod
    def from_options(cls, **options: Any) -> EngineConfig:
        """An EngineConfig from keyword options, where a path may stand for its text.

        Raises:
            ConfigError: An unknown option, with the known names; or one that cannot work.
        """
        known = [option.name for option in fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown option {name!r}; the options are {', '.join(known)}")
        return cls(
            **{
                name: os.fspath(value) if isinstance(value, os.PathLike) else value
                for name, value in options.items()
            }
        )


@cache
def option_types() -> dict[str, Any]:
    """The type of each option of EngineConfig, by its name."""
    return get_type_hints(EngineConfig)


_VALUES: dict[type, tuple[type, str]] = {
    bool: (bool, "True, False"),
    int: (Integral, "an integer"),
    float: (Real, "a number"),
    str: (str, "text"),
    NoneType: (NoneType, "None"),
}
"""What an option of a type may be, and how that is called."""


def _check_type(name: str, value: object) -> None:
    """
    Raises:
        ConfigError: The option is of another type: "false", which is true, or one of no choice.
    """
    kind = option_types()[name]
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ConfigError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}")
        return
    kinds = get_args(kind) or (kind,)
    # True is an int to Python, and nobody's number of threads.
    is_misplaced = isinstance(value, bool) and bool not in kinds
    if is_misplaced or not isinstance(value, tuple(_VALUES[kind][0] for kind in kinds)):
        *others, last = ", ".join(_VALUES[kind][1] for kind in kinds).split(", ")
        wanted = f"{', '.join(others)} or {last}" if others else last
        raise ConfigError(f"{name} must be {wanted}, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The numbers that rule a step, with every default resolved.

    Attributes:
        max_num_batched_tokens: Most tokens in a step.
        max_num_seqs: Most sequences in a step.
        long_prefill_token_threshold: Most prompt tokens of one sequence in a step that others share.
        max_model_len: Longest sequence in tokens, prompt and output.
        max_step_ms: As in `EngineConfig`.
        max_step_slowdown: How many times as long as without its prompts a step may take where no time is given; None:
            any, as tokens would depend on the time that steps take.
        num_stages: Steps that may be in flight at a time, of different sequences: one for each pipeline stage.
    """

    max_num_batched_tokens: int
    max_num_seqs: int
    long_prefill_token_threshold: int
    max_model_len: int
    max_step_ms: float | None = None
    max_step_slowdown: float | None = MAX_STEP_SLOWDOWN
    num_stages: int = 1

    @classmethod
    def resolve(
        cls, config: EngineConfig, max_model_len: int, device: str, is_chunk_invariant: bool = True
    ) -> SchedulerConfig:
        on_cpu = device == "cpu"
        num_tokens = config.max_num_batched_tokens or (512 if on_cpu else 4096)
        num_seqs = config.max_num_seqs or min(64 if on_cpu else 256, num_tokens)
        if num_seqs > num_tokens:
            raise ConfigError(
                f"max_num_seqs ({num_seqs}) exceeds max_num_batched_tokens ({num_tokens}): "
                "a step could not hold one token of each sequence; lower the first or raise the second"
            )
        return cls(
            max_num_batched_tokens=num_tokens,
            max_num_seqs=num_seqs,
            long_prefill_token_threshold=config.long_prefill_token_threshold or max(1, num_tokens // 4),
            max_model_len=max_model_len,
            max_step_ms=config.max_step_ms,
            max_step_slowdown=MAX_STEP_SLOWDOWN if is_chunk_invariant else None,
            num_stages=config.pipeline_parallel_size,
        )
