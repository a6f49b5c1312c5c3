"""lm-eval: log-likelihoods by /v1/completions are those of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.api.conftest import API_KEY, start_server
from tests.clients.conftest import run_program, skip_without
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.process]


def write_tokenizer(path: Path) -> None:
    """One whose tokens are bytes, after the ids of the special ones."""
    alphabet = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({text: index for index, text in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)


def test_likelihoods_are_those_of_the_hf_backend(tmp_path: Path) -> None:
    program = "lm_eval_loglikelihood.py"
    skip_without(program)
    model = tmp_path / "model"
    write_checkpoint(model, TINY_CONFIGS["llama"])
    write_tokenizer(model)
    with start_server(tmp_path, "--model", str(model), "--quant", "none", "--api-key", API_KEY) as server:
        server.wait_until_ready()
        said = run_program(program, server, str(model))
    assert len(said["hf"]) == 4
    for name in ("token ids", "batches of texts"):
        for (served, is_greedy), (expected, is_expected_greedy) in zip(said[name], said["hf"], strict=True):
            assert served == pytest.approx(expected, rel=0, abs=1e-3)
            assert is_greedy == is_expected_greedy
