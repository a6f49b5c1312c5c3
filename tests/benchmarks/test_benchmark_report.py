"""What is printed and recorded."""

import json
from pathlib import Path

from benchmarks.machine import describe_run
from benchmarks.metrics import RequestRecord, summarize
from benchmarks.report import format_summary, format_table, write_json


def test_columns_line_up() -> None:
    assert format_table(["name", "n"], [["a", "100"], ["longer", "1"]]) == (
        "name      n\n" 
        "a       100\n" 
        "longer    1"
    )  # fmt: skip


def test_summary_shows_milliseconds_rates_and_counts() -> None:
    record = RequestRecord(
        start=0.0, end=2.0, text_times=[0.5, 2.0], input_tokens=100, output_tokens=4, cached_tokens=50
    )
    lines = [line.split() for line in format_summary("title", summarize([record])).splitlines()]
    assert lines[0] == ["title"]
    assert lines[2] == ["TTFT", *["500.0"] * 4]
    assert lines[3] == ["ITL", *["1500.0"] * 4]
    assert lines[4] == ["TPOT", *["500.0"] * 4]
    assert lines[5] == ["E2E", *["2000.0"] * 4]
    assert " ".join(lines[6]) == (
        "0.50 req/s | output 2.0 tok/s | total 52.0 tok/s | prefill 100 tok/s | decode 2.0 tok/s"
    )
    assert "100 input tokens, 50 of them cached" in " ".join(lines[7])


def test_summary_of_nothing_but_failures() -> None:
    text = format_summary("title", summarize([RequestRecord(start=0.0, end=1.0, error="refused")]))
    assert "1 requests, 1 failed" in text


def test_the_arguments_are_recorded_without_the_key() -> None:
    for arguments in (["--api-key", "secret", "--seed", "1"], ["--api-key=secret"]):
        run = describe_run(arguments)
        assert "secret" not in json.dumps(run)
        assert "--api-key" in " ".join(run["arguments"])
    assert run["machine"]["usable_cores"] >= 1
    assert run["machine"]["cpu"]


def test_written_results_read_back(tmp_path: Path) -> None:
    result = {"benchmark": "serving", "scenarios": [{"requests": [1.5, None]}], "text": 'quote " and ü'}
    write_json(tmp_path / "result.json", result)
    assert json.loads((tmp_path / "result.json").read_text()) == result
