"""The offline benchmark: its arithmetic, and one small run on the default model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.offline import Measurement
from benchmarks.throughput import format_workload, main, paired_ratio, parse_arguments, parse_option, spread


def measurement(prefill_seconds: float, full_seconds: float) -> Measurement:
    return Measurement(
        num_prompts=4,
        input_tokens=100,
        output_tokens=11,
        prefill_seconds=prefill_seconds,
        full_seconds=full_seconds,
    )


def test_rates_of_a_repetition() -> None:
    run = measurement(prefill_seconds=2.0, full_seconds=7.0)
    assert run.prefill_rate == 200.0  # 4 x 100 tokens in 2 s
    assert run.decode_seconds == 5.0
    assert run.step_seconds == 0.5  # the first of 11 tokens belongs to the prefill
    assert run.decode_rate == 8.0
    assert run.total_rate == pytest.approx(4 * 111 / 7)


def test_ratios_are_taken_within_a_repetition() -> None:
    # The machine was half as fast in the second repetition; the variants' ratio did not change.
    assert paired_ratio([20.0, 10.0, 20.0], [10.0, 5.0, 10.0]) == 2.0


def test_table_has_a_row_a_variant_and_a_ratio_to_the_first() -> None:
    table = format_workload({"none": [measurement(2.0, 7.0)], "int8": [measurement(1.0, 3.5)]})
    header, none, int8 = table.splitlines()
    assert "decode tok/s" in header
    assert (none.split()[0], none.count("1.00x")) == ("none", 3)
    assert (int8.split()[0], int8.count("2.00x")) == ("int8", 3)
    assert "400.0 (400.0-400.0)" in int8


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.0]) == "2.0 (1.0-3.0)"


@pytest.mark.parametrize(
    ("text", "value"), [("512", 512), ("0.5", 0.5), ("False", False), ("None", None), ("24MiB", "24MiB")]
)
def test_option_values(text: str, value: Any) -> None:
    assert parse_option(text) == value


@pytest.mark.parametrize(
    "arguments", ["--output-tokens 1", "--num-prompts 0", "--repetitions 0", "--profile 0"]
)
def test_sizes_that_measure_nothing_are_refused(arguments: str) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(arguments.split())


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    arguments = (
        "--quant int8 --num-prompts 2 --input-tokens 20 --output-tokens 3 --repetitions 2 --profile 1 "
    )
    arguments += f"--option kv_cache_memory 16MiB --option num_threads 1 --output {output}"
    assert main(arguments.split()) == 0
    result = json.loads(output.read_text())
    assert result["engine_options"] == {"kv_cache_memory": "16MiB", "num_threads": 1}
    [workload] = result["workloads"]
    assert len(workload["measurements"]["int8"]) == 2
    for run in workload["measurements"]["int8"]:
        assert (run["num_prompts"], run["input_tokens"], run["output_tokens"]) == (2, 20, 3)
        assert min(run["prefill_seconds"], run["full_seconds"]) > 0
    prefill, decode = workload["operators"]["int8"]
    assert (prefill["name"], decode["name"]) == ("prefill", "decode of 1 tokens")
    assert all(phase["operators"][0]["seconds"] > 0 for phase in (prefill, decode))
    printed = capsys.readouterr().out
    assert "batch of 2" in printed
    assert "share" in printed


def test_an_option_the_engine_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--option", "max_num_sequences", "4"]) == 2
    assert "max_num_sequences" in capsys.readouterr().err
