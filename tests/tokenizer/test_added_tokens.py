"""Tokens outside tokenizer.json: the ids and the texts that transformers has."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from engine.errors import CheckpointError
from engine.tokenizer import load_tokenizer
from engine.tokenizer.files import byte_tokenizer

WORDS = ["<|im_start|>", "<|im_end|>", "<image>", "<tool>", "</s>", "<s>", "a", " b", "  ", "é", "\n"]
WORDS += ["user", "<", "|>"]


def token(content: str, **flags: bool) -> dict[str, Any]:
    usual = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": content, **usual, "special": True, **flags}


ROLES = {"bos_token": "<s>", "eos_token": "</s>"}
FORMS: dict[str, dict[str, dict[str, Any]]] = {
    "decoder": {
        "tokenizer_config.json": {
            **ROLES,
            "added_tokens_decoder": {
                "258": token("<|im_start|>"),
                "259": token("<|im_end|>"),
                "260": token("<tool>", special=False, normalized=True),
                "261": token("<image>", lstrip=True, rstrip=True),
            },
        }
    },
    "decoder changes flags": {
        "tokenizer_config.json": {**ROLES, "added_tokens_decoder": {"257": token("</s>", rstrip=True)}}
    },
    "added_tokens.json": {
        "tokenizer_config.json": ROLES,
        "added_tokens.json": {"<|im_start|>": 258, "<|im_end|>": 259, "<tool>": 260},
        "special_tokens_map.json": {"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]},
    },
    "special_tokens_map.json": {
        "special_tokens_map.json": {**ROLES, "eos_token": token("<|im_end|>"), "sep_token": "<tool>"}
    },
    "extra list": {"tokenizer_config.json": {**ROLES, "extra_special_tokens": ["<image>", "<tool>"]}},
    "extra by name": {"tokenizer_config.json": {**ROLES, "extra_special_tokens": {"image_token": "<image>"}}},
    "every role": {
        "tokenizer_config.json": {
            **ROLES,
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "sep_token": "<tool>",
            "cls_token": "<|im_start|>",
            "mask_token": "<image>",
        }
    },
    "bos": {"tokenizer_config.json": {**ROLES, "add_bos_token": True}},
    "bos and eos": {"tokenizer_config.json": {**ROLES, "add_bos_token": True, "add_eos_token": True}},
}


def write(path: Path, form: str) -> Path:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text('{"model_type": "llama"}')
    for name, content in {"tokenizer_config.json": {}, **FORMS[form]}.items():
        if name == "tokenizer_config.json":
            content = {"tokenizer_class": "PreTrainedTokenizerFast", **content}
        (path / name).write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("form", FORMS)
def test_ids_and_texts_are_those_of_transformers(form: str, tmp_path: Path) -> None:
    path = write(tmp_path, form)
    ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    generator = random.Random(0)
    for _ in range(200):
        text = "".join(generator.choices(WORDS, k=generator.randint(1, 12)))
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        for skip in (False, True):
            expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == expected
    assert ours.special_token_ids >= set(theirs.all_special_ids)
    assert theirs.eos_token_id in ours.eos_token_ids


def test_roles_are_visible_in_templates(tmp_path: Path) -> None:
    path = write(tmp_path, "every role")
    (path / "chat_template.jinja").write_text(
        "{{ sep_token }} {{ cls_token }} {{ mask_token }} {{ pad_token }}"
    )
    messages = [{"role": "user", "content": "x"}]
    assert load_tokenizer(path).apply_chat_template(messages) == "<tool> <|im_start|> <image> <pad>"
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["extra_special_tokens"] = {"image_token": "<image>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "chat_template.jinja").write_text("{{ image_token }}")
    assert load_tokenizer(path).apply_chat_template(messages) == "<image>"


def test_an_id_that_the_tokenizer_does_not_give_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, "decoder")
    config = {"added_tokens_decoder": {"300": token("<far>")}}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    load_tokenizer(path)
    assert "'<far>' is said to have id 300, and has 258" in caplog.text


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": token("a")}}, "tokens by id"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"5": 7}},
            "added_tokens_decoder.5: expected a token",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"5": {"content": "a", "lstrip": 1}}},
            "expected a token",
        ),
        ("tokenizer_config.json", {"eos_token": 5}, "eos_token: expected a token"),
        ("tokenizer_config.json", {"extra_special_tokens": 5}, "a list of tokens"),
        ("added_tokens.json", {"<tool>": "x"}, "'<tool>': expected an id"),
    ],
)
def test_damaged_files(tmp_path: Path, file: str, content: dict[str, Any], words: str) -> None:
    path = write(tmp_path, "every role")
    (path / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=words) as caught:
        load_tokenizer(path)
    assert str(path / file) in str(caught.value)
