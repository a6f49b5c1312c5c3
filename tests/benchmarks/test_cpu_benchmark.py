"""The comparison on a CPU: its prompts and tables, and small runs against a peer and a server of ours."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.client import ServerError
from benchmarks.cpu import (
    SCENARIOS,
    ExactPrompts,
    disturbance,
    engine_options,
    format_comparison,
    main,
    parse_arguments,
)
from benchmarks.servers import (
    machine_seconds,
    process_tree,
    processor_seconds,
    proportional_memory,
    running_engine,
)
from engine.loading.resolve import resolve_model
from engine.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.completions_server import CompletionsServer, running_server

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(resolve_model("llama"))


@pytest.fixture
def peer() -> Iterator[CompletionsServer]:
    with running_server() as server:
        yield server


@pytest.mark.parametrize("name", SCENARIOS)
def test_prompts_have_exactly_the_wanted_tokens(tokenizer: Tokenizer, name: str) -> None:
    scenario, prompts = SCENARIOS[name], ExactPrompts(tokenizer, "0")
    requests = prompts.requests(scenario) + prompts.requests(scenario)
    encoded = [tokenizer.encode(request.prompt) for request in requests]
    assert {len(tokens) for tokens in encoded} == {scenario.shared_tokens + scenario.own_tokens}
    shared = scenario.shared_tokens
    first, second = encoded[: scenario.streams], encoded[scenario.streams :]
    assert {tuple(tokens[:shared]) for tokens in first} == {tuple(first[0][:shared])}
    # Nothing else is found in a prefix cache: own parts differ within their first block, and runs in all.
    assert len({tuple(tokens[shared : shared + 16]) for tokens in encoded}) == len(encoded)
    assert first[0][:16] != second[0][:16]


def test_table_shows_spreads_and_ratios_to_the_best_peer() -> None:
    values = {
        "ours": {"A": [30.0, 10.0, 20.0], "E": [2.0], "start": [1.5]},
        "slow": {"A": [5.0], "E": [8.0]},
        "fast": {"A": [10.0], "E": [4.0], "memory": [100.4]},
    }
    header, a, e, start, memory = format_comparison(values, ["slow", "fast"]).splitlines()
    assert header.split() == ["ours", "slow", "fast"]
    assert a.split()[-6:] == ["tok/s", "20.0", "(10.0..30.0)", "2.00x", "5.0", "10.0"]
    assert e.split()[-5:] == ["s", "2.00", "2.00x", "8.00", "4.00"]  # a time: less is better
    assert start.split()[-4:] == ["s", "1.50", "-", "-"]
    assert memory.split()[-4:] == ["MiB", "-", "-", "100"]


def test_what_other_programs_took_is_told_of_counted_runs() -> None:
    shares = [(False, 2.0), (True, 0.1), (True, None), (True, 0.3), (True, 0.2)]
    runs = [{"counted": counted, "foreign_cores": share} for counted, share in shares]
    assert "0.20 cores (up to 0.30)" in disturbance(runs)
    assert "not known" in disturbance(runs[2:3])


def test_our_servers_are_every_pair_of_types() -> None:
    arguments = "--quant int8 int4 --kv-cache-dtype bfloat16 int8 --option num_threads 1"
    engines = engine_options(parse_arguments(arguments.split()))
    assert list(engines) == ["int8 bfloat16", "int8 int8", "int4 bfloat16", "int4 int8"]
    assert engines["int4 int8"][:4] == ["--quant", "int4", "--kv-cache-dtype", "int8"]
    assert engines["int4 int8"][-2:] == ["--num-threads", "1"]


@pytest.mark.parametrize(
    "arguments",
    ["--quant", "--peer 127.0.0.1:80", "--peer-pid x=1", "--peer x=http://h --peer-pid x=y", "--repeat 0"],
)
def test_arguments_that_make_no_sense_are_refused(arguments: str) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(arguments.split())


def test_processes_are_counted_with_their_descendants() -> None:
    # A parent that sleeps and a child that computes and holds 64 MiB.
    child = "data = b'x' * (64 << 20); sum(range(2_000_000)); print('up', flush=True); input()"
    parent = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {child!r}]).returncode)"
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        tree = process_tree(process.pid)
        assert len(tree) == 2
        assert set(tree) <= set(process_tree(os.getpid()))
        assert 64 < proportional_memory(tree) < 256
        assert proportional_memory([process.pid]) < 64
        assert machine_seconds() > processor_seconds(tree) > processor_seconds([process.pid]) > 0
        process.stdin.write("\n")
    assert proportional_memory(tree) == processor_seconds(tree) == 0


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of quiet between runs, which only figures need."""
    monkeypatch.setattr("benchmarks.cpu._PAUSE_SECONDS", 0.0)
    monkeypatch.setattr("benchmarks.cpu._IDLE_SECONDS", 0.5)


@pytest.mark.parametrize("has_ignore_eos", [True, False])
def test_a_run_against_a_peer(
    peer: CompletionsServer, has_ignore_eos: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    arguments = f"--quant --peer tiny={peer.base_url}/v1=name --repeat 2 --output {output}"
    assert main([*arguments.split(), *([] if has_ignore_eos else ["--without-ignore-eos", "tiny"])]) == 0
    result = json.loads(output.read_text())
    assert {row: len(values) for row, values in result["values"]["tiny"].items()} == dict.fromkeys("ABCDE", 2)
    assert len(result["runs"]) == 3 * 5  # one round is not counted
    assert sum(run["counted"] for run in result["runs"]) == 2 * 5
    assert result["peers"]["tiny"]["version"] == "1.2.3"
    assert all(body["model"] == "name" and body["temperature"] == 0 for body in peer.bodies)
    if has_ignore_eos:
        assert all(body["ignore_eos"] for body in peer.bodies)
    else:
        assert all(body["logit_bias"] == {"0": -100, "2": -100} for body in peer.bodies)
        assert not any("ignore_eos" in body for body in peer.bodies)
    printed = capsys.readouterr().out
    assert "32 at once" in printed
    assert "start to ready" not in printed  # it was up before


def test_all_requests_of_a_run_are_open_at_once(peer: CompletionsServer, tmp_path: Path) -> None:
    peer.gate = 32  # or nothing would be answered
    arguments = (
        f"--quant --peer tiny={peer.base_url} --scenario C --repeat 1 --output {tmp_path / 'result.json'}"
    )
    assert main(arguments.split()) == 0


def test_a_run_of_which_requests_fail_has_no_value(
    peer: CompletionsServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer.fault, peer.good_answers = "error event", 2
    output = tmp_path / "result.json"
    arguments = f"--quant --peer tiny={peer.base_url} --scenario A --repeat 2 --output {output}"
    assert main(arguments.split()) == 1  # one round is not counted, one succeeds, one fails
    result = json.loads(output.read_text())
    assert len(result["values"]["tiny"]["A"]) == 1
    assert result["errors"] == ["tiny, scenario A: the engine died"]
    assert "the engine died" in capsys.readouterr().out


def test_a_server_of_ours_is_started_and_measured(
    peer: CompletionsServer, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    arguments = f"--model {small_model} --quant int8 --kv-cache-memory 64MiB --option max_num_seqs 8 "
    arguments += (
        f"--peer tiny={peer.base_url} --peer-pid tiny={os.getpid()} --scenario D --repeat 1 --output {output}"
    )
    assert main(arguments.split()) == 0
    result = json.loads(output.read_text())
    ours = result["values"]["int8 int8"]
    assert {row: len(values) for row, values in ours.items()} == {"start": 1, "memory": 1, "idle": 1, "D": 1}
    assert 0.1 < ours["start"][0] < 300
    assert 100 < ours["memory"][0] < 8192
    [run] = [run for run in result["runs"] if run["counted"] and run["server"] == "int8 int8"]
    [request] = run["requests"]
    assert (request["input_tokens"], request["output_tokens"], request["cached_tokens"]) == (1024, 1, 0)
    assert capsys.readouterr().out.count("x ") >= 1


def test_a_server_of_ours_that_does_not_start_tells_why() -> None:
    async def start() -> None:
        async with running_engine("wrong", ["--model", "/nowhere"]):
            raise AssertionError("it started")

    with pytest.raises(ServerError, match=r"wrong did not become ready[^$]*/nowhere"):
        asyncio.run(start())
