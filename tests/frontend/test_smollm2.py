"""The default model against transformers: float32 greedy continuations of many prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from engine import LLM, SamplingParams
from engine.loading.resolve import resolve_model
from tests.helpers.prompts import PROMPTS

NUM_PROMPTS, NUM_TOKENS = 10, 24
TIE = 1e-4
"""Two logits this close may change places with the order of a float32 sum."""

MAX_TIES = 3


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    """SmolLM2 as transformers runs it: its published configuration, the weights as transformers reads them."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    path: Path = resolve_model("llama")
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(
        {name: torch.as_tensor(tensor) for name, tensor in tensors.items()}, strict=False
    )
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return model.eval()


def test_greedy_continuations_agree_with_transformers(reference: LlamaForCausalLM) -> None:
    """Given the same tokens so far, transformers chooses our next one, at every position: by induction
    its own greedy continuation is ours."""
    llm = LLM("llama", quant="none", dtype="float32", device="cpu", kv_cache_memory="128MiB")
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    results = llm.generate(PROMPTS[:NUM_PROMPTS], params, use_tqdm=False)
    assert len({tuple(result.outputs[0].token_ids) for result in results}) == NUM_PROMPTS
    ties = 0
    for result in results:
        continuation = torch.tensor(result.outputs[0].token_ids)
        assert len(continuation) == NUM_TOKENS
        token_ids = torch.tensor([result.prompt_token_ids + result.outputs[0].token_ids])
        with torch.inference_mode():
            logits = reference(token_ids[:, :-1], logits_to_keep=NUM_TOKENS, use_cache=False).logits[0]
        behind = logits.amax(dim=1) - logits.gather(1, continuation[:, None])[:, 0]
        assert behind.max() < TIE, f"{result.prompt!r} leaves transformers at token {behind.argmax()}"
        ties += int((behind > 0).sum())
    assert ties <= MAX_TIES
