"""Files of requests: what is asked, what is answered, and what is not asked again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from engine.batch import read_answered, read_lines
from engine.errors import ConfigError
from tests.agents.scripted_engine import write_model


def line(custom_id: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return path


def test_a_line_that_cannot_be_asked_says_why(tmp_path: Path) -> None:
    path = write(
        tmp_path / "in.jsonl",
        line("good", prompt="a"),
        "",
        "{",
        {"method": "POST"},
        {**line("get"), "method": "GET"},
        line("path", "/v1/models"),
        {**line("body"), "body": []},
        line("stream", stream=True),
    )
    read = {one.custom_id: one.problem for one in read_lines(path)}
    assert read.pop("good") is None
    for name, words in (
        ("line-3", "no JSON object"),
        ("line-4", "custom_id"),
        ("get", "GET"),
        ("path", "/v1/models"),
        ("body", "object"),
        ("stream", "stream"),
    ):
        assert words in (read.pop(name) or "")
    assert not read


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="-i"):
        read_lines(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="'a' stands twice"):
        read_lines(write(tmp_path / "in", line("a"), line("a")))
    for target in (tmp_path / "no" / "out", tmp_path):
        with pytest.raises(ConfigError, match="-o"):
            read_answered(target)
    with pytest.raises(ConfigError, match="-o"):
        read_answered(write(tmp_path / "out", {"custom_id": "a"}))


def test_what_is_answered_is_known_and_what_is_cut_off_is_taken_away(tmp_path: Path) -> None:
    rows = [
        {"custom_id": "good", "response": {"status_code": 200}},
        {"custom_id": "bad", "response": {"status_code": 400}},
        {"custom_id": "broken", "response": {"status_code": 500}},
        {"custom_id": "no line", "response": None},
    ]
    path = write(tmp_path / "out", *rows)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"custom_id": "cut')
    assert read_answered(path) == {"good": True, "bad": False, "no line": False}
    assert path.read_bytes() == whole
    assert read_answered(tmp_path / "nowhere") == {}


@pytest.mark.process
def test_all_endpoints_are_answered_and_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "Hello"}]
    greedy: dict[str, Any] = {"max_tokens": 40, "temperature": 0}
    lines = [
        line("chat", "/v1/chat/completions", model="any", messages=asked, **greedy),
        line("embedding", "/v1/embeddings", input="Hello"),
        line("response", "/v1/responses", input="Hello", max_output_tokens=4),
        line("message", "/v1/messages", messages=asked, max_tokens=4),
        line("refused", prompt="a", temperature=9),
        *(line(f"{i}", prompt=f"Number {i} is", ignore_eos=True, **greedy) for i in range(40)),
    ]
    source, target = write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "engine.batch", "-i", str(source), "-o", str(target)]
    (tmp_path / "model").mkdir()
    command += ["--model", str(write_model(tmp_path / "model")), "--load-format", "dummy", "--quant", "int8"]
    command += ["--kv-cache-memory", "64MiB", "--max-num-seqs", "2", "--max-model-len", "1024"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=_heed_interrupts) as process:
        while process.poll() is None and (not target.exists() or target.read_bytes().count(b"\n") < 8):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode == 130, said.decode()
    assert b"goes on" in said
    before = target.read_bytes()
    assert 8 <= before.count(b"\n") < len(lines)
    finished = subprocess.run(command, stderr=subprocess.PIPE, check=False, text=True)
    assert finished.returncode == 1, finished.stderr
    assert f"{len(lines) - 1} of {len(lines)} answered" in finished.stderr
    assert target.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    rows = [json.loads(text) for text in target.read_text().splitlines()]
    answers = {row["custom_id"]: row["response"] for row in rows}
    assert len(answers) == len(rows) == len(lines)
    assert answers.pop("refused")["body"]["error"]["param"] == "temperature"
    assert {answer["status_code"] for answer in answers.values()} == {200}
    assert all(answer["request_id"] for answer in answers.values())
    assert answers["chat"]["body"]["model"] == "any"
    kinds = {name: answers[name]["body"].get("object") for name in ("chat", "embedding", "response", "0")}
    assert kinds == {
        "chat": "chat.completion",
        "embedding": "list",
        "response": "response",
        "0": "text_completion",
    }
    assert answers["message"]["body"]["type"] == "message"


def _heed_interrupts() -> None:
    # Who runs the tests in the background may ignore them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setpgrp()
