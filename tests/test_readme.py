"""The page of options lists every one that there is, and none that there is not."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from engine.arguments import build_parser
from engine.config import EngineConfig, SchedulerConfig, format_bytes, parse_bytes
from engine.errors import ConfigError

OPTIONS_PAGE = (Path(__file__).parent.parent / "docs" / "options.md").read_text()
OPTIONS = {"--" + field.name.replace("_", "-") for field in fields(EngineConfig)}


def test_the_table_of_options_is_complete() -> None:
    assert set(re.findall(r"^\| `(--[a-z-]+)` \|", OPTIONS_PAGE, re.MULTILINE)) == OPTIONS


def test_every_option_of_the_engine_is_one_of_the_server() -> None:
    known = set(build_parser()._option_string_actions)
    assert known >= OPTIONS
    options = vars(build_parser().parse_args(["--no-enable-prefix-caching", "--max-model-len", "77"]))
    assert (options["enable_prefix_caching"], options["max_model_len"]) == (False, 77)


def test_help_does_not_show_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_API_KEY", "a secret")
    assert "a secret" not in build_parser().format_help()


@pytest.mark.parametrize(
    ("text", "size"), [("512MiB", 2**29), ("1.5GiB", 3 * 2**29), ("10", 10), ("4 KB", 4000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1MiB", "5 XB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="512MiB"):
        parse_bytes(text)


def test_format_bytes() -> None:
    assert [format_bytes(size) for size in (5, 2048, 3 * 2**29)] == ["5 B", "2.0 KiB", "1.5 GiB"]


def test_defaults_fit_together() -> None:
    small = SchedulerConfig.resolve(EngineConfig(max_num_batched_tokens=16), 100, "cpu")
    assert (small.max_num_seqs, small.long_prefill_token_threshold) == (16, 4)
    gpu = SchedulerConfig.resolve(EngineConfig(), 100, "cuda")
    assert (gpu.max_num_seqs, gpu.max_num_batched_tokens) == (256, 4096)
