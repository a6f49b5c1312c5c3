"""The comparison on a CPU: its prompts and tables, and small runs against a peer and a server of ours."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.client import ServerError
from benchmarks.cpu import (
    disturbance,
    engine_options,
    format_comparison,
    format_shares,
    main,
    parse_arguments,
)
from benchmarks.cpu_scenarios import SCENARIOS, ExactPrompts
from benchmarks.roofline import (
    Footprint,
    Peaks,
    footprint_of_engine,
    footprint_of_peer,
    measure_peaks,
    shares,
)
from benchmarks.servers import (
    machine_seconds,
    process_tree,
    processor_seconds,
    proportional_memory,
    running_engine,
    running_hogs,
)
from engine.config import EngineConfig
from engine.errors import ModelNotFoundError
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
    assert {len(tokens) for tokens in encoded} == {scenario.prompt_tokens}
    shared = scenario.shared_tokens
    first, second = encoded[: scenario.streams], encoded[scenario.streams :]
    if scenario.is_warm:
        assert first == second
        encoded = first
    assert {tuple(tokens[:shared]) for tokens in first} == {tuple(first[0][:shared])}
    # Nothing else is found in a prefix cache: own parts differ within their first block, and runs in all.
    assert len({tuple(tokens[shared : shared + 16]) for tokens in encoded}) == len(encoded)
    assert scenario.is_warm or first[0][:16] != second[0][:16]


@pytest.mark.parametrize("model", ["llama", "gemma"])
def test_every_alias_has_prompts_of_exact_sizes(model: str) -> None:
    try:
        tokenizer = load_tokenizer(resolve_model(model))
    except ModelNotFoundError as error:
        pytest.skip(str(error))
    assert len(tokenizer.encode(ExactPrompts(tokenizer, "0").make(100))) == 100


def test_short_scenarios_have_the_same_titles_but_for_the_sizes() -> None:
    assert [scenario.shortened().title for scenario in SCENARIOS.values()][:5] == [
        "1 x 8 in, 8 out, decode",
        "8 x 8 in, 8 out",
        "32 x 16 in, 8 out",
        "1 x 64 in, 1 out, prefill",
        "32 x 32 shared + 2 in, 2 out",
    ]


def test_table_shows_spreads_and_ratios_to_the_best_peer() -> None:
    values = {
        "ours": {"A": [30.0, 10.0, 20.0], "E": [2.0], "start": [1.5]},
        "slow": {"A": [5.0], "E": [8.0]},
        "fast": {"A": [10.0], "E": [4.0], "memory": [100.4]},
    }
    table = format_comparison(
        values, ["slow", "fast"], SCENARIOS, lambda server, name, value: f" [{value:.0f}]"
    )
    header, a, e, start, memory = table.splitlines()
    assert header.split() == ["ours", "slow", "fast"]
    assert a.split()[-9:] == ["tok/s", "20.0", "(10.0..30.0)", "2.00x", "[20]", "5.0", "[5]", "10.0", "[10]"]
    assert e.split()[-8:] == ["s", "2.00", "2.00x", "[2]", "8.00", "[8]", "4.00", "[4]"]  # less is better
    assert start.split()[-4:] == ["s", "1.50", "-", "-"]
    assert memory.split()[-4:] == ["MiB", "-", "-", "100"]


# A model of 100 bytes with a cache of 1 byte a token and layer: two layers, one of them with a window of 10 tokens.
TINY = Footprint(100, 1, layer_products=50, head_products=7, attention_products=3, windows=[None, 10])


def test_shares_are_of_what_the_model_asks_for() -> None:
    peaks = Peaks(bytes_per_second=1e4, products_per_second=1e5)
    # 127 steps, each with its weights and the tokens before it, 192 on average in one layer and 10 in the other.
    read, multiplied = shares(SCENARIOS["A"], 12.7, TINY, peaks)
    assert read == pytest.approx(127 * (100 + 192 + 10) / 10.0 / 1e4)
    assert multiplied == pytest.approx(127 * (50 + 7 + 3 * (192 + 10)) / 10.0 / 1e5)
    # 1024 tokens in 4 s, each with half of them before it; the weights at least once.
    read, multiplied = shares(SCENARIOS["D"], 256.0, TINY, peaks)
    assert read == pytest.approx(100 / 4 / 1e4)
    assert multiplied == pytest.approx(1024 * (50 + 3 * (512 + 10)) / 4 / 1e5)
    # 32 requests of 32 steps and 32 tokens of their own behind 512 that are computed once.
    _, multiplied = shares(SCENARIOS["E"], 2.0, TINY, peaks)
    decoded = 32 * 32 * (50 + 7 + 3 * (560 + 10))
    prefilled = 1024 * (50 + 3 * (528 + 10)) + 512 * (50 + 3 * (256 + 10))
    assert multiplied == pytest.approx((decoded + prefilled) / 2 / 1e5)
    assert format_shares(SCENARIOS["A"], 12.7, TINY, peaks) == " [38|8]"


def test_footprints_of_the_default_model() -> None:
    ours = footprint_of_engine(EngineConfig(model="llama", quant="int8"))
    peer = footprint_of_peer("llama", None)
    assert ours.layer_products == peer.layer_products == 30 * (576 * 576 * 2 + 576 * 192 * 2 + 3 * 576 * 1536)
    assert ours.weight_bytes is not None
    # A byte a weight, a scale an output feature and the norms.
    assert 1.0 < ours.weight_bytes / (ours.layer_products + ours.head_products) < 1.05
    assert (ours.cache_bytes, peer.cache_bytes) == (2 * 3 * (64 + 4), 2 * 3 * 64 * 2)
    assert peer.weight_bytes is None
    assert format_shares(SCENARIOS["A"], 1.0, peer, Peaks(1e9, 1e9)).startswith(" [-|")


def test_peaks_are_measured() -> None:
    peaks = measure_peaks()
    assert 1e8 < peaks.bytes_per_second < 1e13
    assert 1e9 < peaks.products_per_second < 1e16


def test_hogs_compute_until_the_end() -> None:
    with running_hogs(2) as hogs:
        used = 0.0
        while used < 0.1:
            used = min(processor_seconds([hog]) for hog in hogs)
    assert processor_seconds(hogs) == 0


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
    [
        "--quant",
        "--peer x=http://h --peer-weights x=/nowhere",
        "--peer 127.0.0.1:80",
        "--peer-pid x=1",
        "--peer x=http://h --peer-pid x=y",
        "--repeat 0",
    ],
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
    assert len(result["runs"]) == 3 * 5 + 1  # one round is not counted, nor is a first run
    assert sum(run["counted"] for run in result["runs"]) == 2 * 5
    assert result["peers"]["tiny"]["version"] == "1.2.3"
    assert all(body["model"] == "name" and body["temperature"] == 0 for body in peer.bodies)
    if has_ignore_eos:
        assert all(body["ignore_eos"] for body in peer.bodies)
    else:
        assert all(body["logit_bias"] == {"0": -100, "2": -100} for body in peer.bodies)
        assert not any("ignore_eos" in body for body in peer.bodies)
    printed = capsys.readouterr().out
    assert "E  32 x 512 shared + 32 in, 32 out" in printed
    assert "start to ready" not in printed  # it was up before


def test_what_requests_ask_for(peer: CompletionsServer, tmp_path: Path) -> None:
    names = ["sampled-8", "penalties-8", "logprobs-8", "busy"]
    arguments = f"--quant --peer tiny={peer.base_url} --short --repeat 1 --output {tmp_path / 'result.json'}"
    assert main([*arguments.split(), "--scenario", *names]) == 0
    # What is not counted comes first, as the first scenario.
    bounds = [8, 16, 24, 32, 34]
    sampled, penalized, listed, busy = (peer.bodies[start:end] for start, end in pairwise(bounds))
    assert {body["temperature"] for body in listed + busy} == {0}
    assert all((body["temperature"], body["top_p"], body["top_k"]) == (0.8, 0.95, 0) for body in sampled)
    # llama.cpp has its own name for a field.
    assert all(body["repetition_penalty"] == body["repeat_penalty"] == 1.1 for body in penalized)
    assert all(body["logprobs"] == 5 for body in listed)
    # One that fills the prefix cache, and the same again.
    assert [body["max_tokens"] for body in busy] == [1, 8]
    assert busy[0]["prompt"] == busy[1]["prompt"]


def test_all_requests_of_a_run_are_open_at_once(peer: CompletionsServer, tmp_path: Path) -> None:
    peer.gate = 32  # or nothing would be answered
    arguments = (
        f"--quant --peer tiny={peer.base_url} --scenario C --repeat 1 --output {tmp_path / 'result.json'}"
    )
    assert main(arguments.split()) == 0


def test_a_run_of_which_requests_fail_has_no_value(
    peer: CompletionsServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer.fault, peer.good_answers = "error event", 4
    output = tmp_path / "result.json"
    arguments = f"--quant --peer tiny={peer.base_url} --scenario A --repeat 2 --output {output}"
    assert main(arguments.split()) == 1  # what is not counted succeeds, and one that is; one fails
    result = json.loads(output.read_text())
    assert len(result["values"]["tiny"]["A"]) == 1
    assert result["errors"] == ["tiny, scenario A: the engine died"]
    assert "the engine died" in capsys.readouterr().out


def test_a_server_of_ours_is_started_and_measured(
    peer: CompletionsServer, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    arguments = f"--model {small_model} --quant int8 --kv-cache-memory 64MiB --option max_num_seqs 8 "
    arguments += f"--peer tiny={peer.base_url} --peer-pid tiny={os.getpid()} "
    arguments += f"--scenario D decode-8k start memory --repeat 1 --short --output {output}"
    assert main(arguments.split()) == 0
    result = json.loads(output.read_text())
    ours = result["values"]["int8 int8"]
    assert {row: len(values) for row, values in ours.items()} == {
        "start": 1,
        "memory": 1,
        "idle": 1,
        "D": 1,
        "decode-8k": 1,
    }
    assert 0.1 < ours["start"][0] < 300
    assert 100 < ours["memory"][0] < 8192
    runs = {run["scenario"]: run for run in result["runs"] if run["counted"] and run["server"] == "int8 int8"}
    [cold], [warm] = runs["D"]["requests"], runs["decode-8k"]["requests"]
    assert (cold["input_tokens"], cold["output_tokens"], cold["cached_tokens"]) == (64, 1, 0)
    # Whole blocks of 16 tokens.
    assert (warm["input_tokens"], warm["output_tokens"], warm["cached_tokens"]) == (500, 8, 496)
    assert re.search(r" \d+\.\d\dx \[\d+\|\d+\]", capsys.readouterr().out)


def test_a_server_of_ours_that_does_not_start_tells_why() -> None:
    async def start() -> None:
        async with running_engine("wrong", ["--model", "/nowhere"]):
            raise AssertionError("it started")

    with pytest.raises(ServerError, match=r"wrong did not become ready[^$]*/nowhere"):
        asyncio.run(start())
