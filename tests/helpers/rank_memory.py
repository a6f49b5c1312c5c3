"""What each rank of an engine holds, from outside: `python -m tests.helpers.rank_memory TINY MODEL QUANT SIZE`.

An engine of a tiny model in the same format runs first: what its ranks hold besides their tiny shares is what a
process takes by itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import torch

from engine import SamplingParams
from engine.config import EngineConfig
from engine.core.request import Request
from engine.executor.start import start_engine
from engine.loading.resolve import resolve_model

OPTIONS = {
    "device": "cpu",
    "kv_cache_memory": "2MiB",
    "max_model_len": 128,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 8,
    "num_threads": 1,
}
VOCAB_SIZE = 300
NUM_REQUESTS, NUM_PROMPT_TOKENS, NUM_TOKENS = 8, 40, 16


def held_bytes(process_id: int) -> int:
    """A process's own memory: what is no file's, and what it has mapped of its file of parsed weights."""
    held, is_weights = 0, False
    for line in Path(f"/proc/{process_id}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            is_weights = line.endswith(".safetensors")
        elif words[0] == ("Rss:" if is_weights else "Anonymous:"):
            held += 1024 * int(words[1])
    return held


def measure(model: str, quant: str, size: int, load_format: str) -> tuple[list[int], dict[str, int]]:
    """What each rank holds after requests, and what rank 0's plan says."""
    options = {"quant": quant, "tensor_parallel_size": size, "load_format": load_format, **OPTIONS}
    config = EngineConfig.from_options(model=model, **options)
    core = start_engine(config, resolve_model(model), ())  # no tokenizer: that is not a rank's
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, VOCAB_SIZE, (NUM_REQUESTS, NUM_PROMPT_TOKENS), generator=generator).tolist()
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        core.add_request(Request(request_id=str(index), prompt_token_ids=prompt, params=params, seed=index))
    while core.has_work:
        core.step()
    process = psutil.Process()
    ranks = [process.pid, *(child.pid for child in process.children())]
    held = [held_bytes(rank) for rank in ranks]
    plan = core.model.runner.plan
    core.close()
    names = ("weights", "copies", "activations", "kv_cache")
    return held, {name: getattr(plan, name) for name in names}


def main(tiny: str, model: str, quant: str, size: int) -> None:
    """Prints as JSON what each rank holds beyond the same process with a tiny model, and the plan."""
    bases, base_plan = measure(tiny, quant, size, "dummy")
    held, plan = measure(model, quant, size, "auto")
    assert len(bases) == len(held) == size
    grown = [rank - base + base_plan["weights"] for rank, base in zip(held, bases, strict=True)]
    print(json.dumps({"grown": grown, "bases": bases, **plan}))


if __name__ == "__main__":
    main(*sys.argv[1:4], size=int(sys.argv[4]))
