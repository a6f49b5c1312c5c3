"""An LLM serving engine: continuous batching over a paged KV cache, on CPUs and GPUs.

>>> from engine import LLM, SamplingParams
>>> LLM(model="llama", quant="int8").generate(["The capital of France is"], SamplingParams(max_tokens=16))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.config import EngineConfig
from engine.core.outputs import CompletionOutput, Logprob, RequestOutput, Score
from engine.core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.frontend.llm import LLM

__all__ = ["LLM", "CompletionOutput", "EngineConfig", "Logprob", "RequestOutput", "SamplingParams", "Score"]


def __getattr__(name: str) -> Any:
    # LLM brings torch with it, which the API process does without.
    if name == "LLM":
        from engine.frontend.llm import LLM

        return LLM
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
