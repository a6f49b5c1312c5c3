"""What a serving engine holds, measured in its process: `python -m tests.helpers.serving_memory MODEL QUANT`."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch

from engine import LLM, SamplingParams

NUM_REQUESTS = 40
MAX_PROMPT = 48
MAX_TOKENS = 8


def held_bytes() -> int:
    """Memory of this process (RSS: what others map beside it, and when they end, does not change it as it does PSS).

    What the allocator keeps for later, after weights were parsed for instance, is given back first.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss:"))


def main(model: str, quant: str) -> None:
    """Serves mixed requests, and prints as JSON what came to be held and what the plan says of it."""
    before = held_bytes()
    llm = LLM(model, quant=quant, device="cpu", kv_cache_memory="32MiB", max_model_len=512)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, MAX_PROMPT + 1, (NUM_REQUESTS,), generator=generator).tolist()
    prompts = [torch.randint(1000, 2000, (size,), generator=generator).tolist() for size in sizes]
    params = [
        SamplingParams(max_tokens=1 + index % MAX_TOKENS, seed=index, ignore_eos=True)
        for index in range(NUM_REQUESTS)
    ]
    # More than a step holds: prompts start while others decode.
    outputs = llm.generate(prompts, params, use_tqdm=False)
    plan = llm.core.model.runner.plan
    found = {
        "growth": held_bytes() - before,
        "weights": plan.weights,
        "kv_cache": plan.kv_cache,
        "num_tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
