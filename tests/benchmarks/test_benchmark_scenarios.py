"""Traces are read as they are written, and scenarios ask for what they say."""

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.prompts import WORDS, PromptMaker
from benchmarks.scenarios import SCENARIOS, Arrival, Scenario, TraceError, WorkloadOptions, read_trace

TRACE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,3960,109
2023-11-16 18:15:51.2224670,879,0
"""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return path


def build(name: str, options: WorkloadOptions) -> Scenario:
    return SCENARIOS[name](options, PromptMaker(seed=0, salt=1))


def test_trace_times_count_from_the_first_row(trace: Path) -> None:
    arrivals = read_trace(trace)
    assert [arrival.time for arrival in arrivals] == pytest.approx([0.0, 4.314579, 4.541877])
    assert [arrival.context_tokens for arrival in arrivals] == [374, 3960, 879]
    assert [arrival.generated_tokens for arrival in arrivals] == [44, 109, 0]
    assert len(read_trace(trace, limit=2)) == 2


def test_trace_with_time_zones_and_further_columns(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "Id,TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "a,2024-05-10 00:00:00.009930+00:00,2162,5\n"
        "b,2024-05-10 00:00:00.509930+00:00,7,15\n"
    )
    assert read_trace(path) == [Arrival(0.0, 2162, 5), Arrival(0.5, 7, 15)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TIMESTAMP,ContextTokens\n2023-11-16 18:15:46,1\n", "no column GeneratedTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no rows"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1,many\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1\n", "line 2"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1,2\n2023-11-16 18:15:45,1,2\n",
            "line 3: earlier",
        ),
    ],
)
def test_a_trace_that_cannot_be_replayed_names_the_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=message):
        read_trace(path)


def test_trace_scenario_scales_times_and_cuts_contexts(trace: Path) -> None:
    scenario = build("trace", WorkloadOptions(trace=trace, trace_speedup=2.0, trace_max_context=500))
    assert scenario.concurrency is None
    assert [request.arrival for request in scenario.requests] == pytest.approx([0.0, 2.1572895, 2.2709385])
    assert [len(request.prompt.split()) for request in scenario.requests] == [374, 500, 500]
    assert [request.max_tokens for request in scenario.requests] == [44, 109, 1]


def test_trace_scenario_without_a_trace() -> None:
    with pytest.raises(TraceError, match="--trace"):
        build("trace", WorkloadOptions())


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "trace"])
def test_prompts_are_unique_from_the_start(name: str) -> None:
    scenario = build(name, WorkloadOptions(shared_prefix_tokens=50))
    prompts = [request.prompt.split() for request in [scenario.warm_up, *scenario.requests]]
    shared = 50 if name == "shared-prefix" else 0
    assert len({tuple(prompt[:shared]) for prompt in prompts}) == 1
    assert len({tuple(prompt[shared : shared + 8]) for prompt in prompts}) == len(prompts)


def test_sizes_follow_the_options() -> None:
    options = WorkloadOptions(input_tokens=30, output_tokens=7, num_requests=3, long_input_tokens=90)
    single, long_prefill = build("single", options), build("long-prefill", options)
    assert [(len(request.prompt.split()), request.max_tokens) for request in single.requests] == [(30, 7)] * 3
    assert [len(request.prompt.split()) for request in long_prefill.requests] == [90] * 3


def test_prompts_repeat_but_for_their_salted_beginning() -> None:
    first, again = (
        PromptMaker(seed=3, salt=1).make(100).split(),
        PromptMaker(seed=3, salt=2).make(100).split(),
    )
    assert first[:8] != again[:8]
    assert first[8:] == again[8:]
    assert PromptMaker(seed=3, salt=1).make(100).split() == first


def test_prompt_length_follows_the_calibration() -> None:
    assert len(PromptMaker(seed=0, salt=0, tokens_per_word=1.6).make(128).split()) == 80
    assert len(PromptMaker(seed=0, salt=0, tokens_per_word=4.0).make(1).split()) == 1


def test_no_word_is_twice_as_likely() -> None:
    assert set(Counter(WORDS).values()) == {1}
