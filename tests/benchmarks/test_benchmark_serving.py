"""The serving benchmark against a small server over real sockets, and its reading of streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.client import CompletionsClient, Exchange, read_exchange
from benchmarks.metrics import RequestRecord
from benchmarks.scenarios import PlannedRequest
from benchmarks.serving import main
from tests.helpers.completions_server import CompletionsServer, Fault, running_server


@pytest.fixture
def server() -> Iterator[CompletionsServer]:
    with running_server() as server:
        yield server


def event(text: str | None = None, finish_reason: str | None = None, **fields: Any) -> bytes:
    choices = [] if text is None else [{"text": text, "finish_reason": finish_reason}]
    return f"data: {json.dumps({'choices': choices, **fields})}\n\n".encode()


USAGE = {"prompt_tokens": 7, "completion_tokens": 4}


def test_events_are_stamped_when_their_line_is_complete() -> None:
    first = event("a")
    exchange = Exchange(
        start=10.0,
        end=19.0,
        status=200,
        pieces=[
            (11.0, event("")),  # no text yet: not the first token
            (12.0, first[:9]),
            (13.0, first[9:] + event("b")),
            (14.0, b": comment\r\n\r\n" + event("c").replace(b"\n", b"\r\n")),
            (15.0, event("", finish_reason="stop")),
            (16.0, event(usage=USAGE) + b"data: [DONE]\n\n"),
        ],
    )
    record = read_exchange(exchange, origin=10.0)
    assert record == RequestRecord(
        start=0.0, end=5.0, text_times=[3.0, 3.0, 4.0], input_tokens=7, output_tokens=4, status=200
    )
    assert (record.ttft, record.itl, record.e2e) == (3.0, [0.0, 1.0], 5.0)


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (event("a", "stop"), 200, "no usage"),
        (event("a") + event(usage=USAGE), 200, "without a finish_reason"),
        (b"data: {nonsense\n\n", 200, "not JSON"),
        (event("a") + b'data: {"error": {"message": "out of luck"}}\n\n', 200, "out of luck"),
        (b'{"error": {"message": "no such model"}}', 404, "HTTP 404: no such model"),
        (b"<html>bad gateway</html>", 502, "HTTP 502: <html>"),
    ],
)
def test_what_makes_a_request_fail(body: bytes, status: int, reason: str) -> None:
    record = read_exchange(Exchange(start=1.0, end=2.0, pieces=[(1.5, body)], status=status))
    assert record.error is not None
    assert reason in record.error


def run(
    server: CompletionsServer, requests: list[PlannedRequest], concurrency: int | None
) -> list[RequestRecord]:
    async def go() -> list[RequestRecord]:
        async with CompletionsClient(server.base_url, "tiny", None, ignore_eos=True) as client:
            return await client.run(requests, concurrency, on_done=lambda: None)

    return asyncio.run(asyncio.wait_for(go(), timeout=60))


def test_streams_are_kept_busy_and_never_exceeded(server: CompletionsServer) -> None:
    server.gate = 3  # were fewer requests open at once, none would be answered
    records = run(server, [PlannedRequest(f"prompt {n}", max_tokens=n + 1) for n in range(7)], concurrency=3)
    assert server.most_open == 3
    assert [record.error for record in records] == [None] * 7
    assert [record.output_tokens for record in records] == [1, 2, 3, 4, 5, 6, 7]
    assert [len(record.text_times) for record in records] == [1, 2, 3, 4, 5, 6, 7]
    for record in records:
        assert record.start < record.text_times[0]
        assert record.text_times == sorted(record.text_times)
        assert record.text_times[-1] <= record.end


def test_arrivals_do_not_wait_for_answers(server: CompletionsServer) -> None:
    server.gate = 4
    arrivals = [0.0, 0.01, 0.02, 0.05]
    records = run(server, [PlannedRequest("prompt", 2, arrival) for arrival in arrivals], concurrency=None)
    assert server.most_open == 4
    for record, arrival in zip(records, arrivals, strict=True):
        assert record.scheduled == pytest.approx(arrival)
        assert record.start >= arrival
        assert record.text_times[0] > arrivals[-1]


def test_report_of_a_whole_run(
    server: CompletionsServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, output = tmp_path / "trace.csv", tmp_path / "result.json"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,4\n"
        "2023-11-16 18:15:46.7805900,30,2\n"
    )
    arguments = f"--base-url {server.base_url}/v1/ --api-key secret --num-requests 3 --output {output} "
    arguments += "--input-tokens 40 --output-tokens 5 --scenario concurrent-8 --scenario trace "
    assert main([*arguments.split(), "--trace", str(trace), "--trace-max-context", "100"]) == 0

    result = json.loads(output.read_text())
    concurrent, replay = result["scenarios"]
    assert (result["model"], result["tokens_per_word"]) == ("tiny", 2.0)
    assert result["machine"]["python"]
    assert concurrent["summary"]["num_failed"] == 0
    assert concurrent["summary"]["input_tokens"] == 3 * 40
    assert concurrent["summary"]["output_tokens"] == 3 * 5
    assert concurrent["summary"]["cached_tokens"] == 3 * 3
    assert [request["input_tokens"] for request in replay["requests"]] == [100, 30]
    assert [request["output_tokens"] for request in replay["requests"]] == [4, 2]
    # Calibration, then a warm-up and the requests of each scenario.
    assert [body["max_tokens"] for body in server.bodies] == [1, *[5] * 4, 4, 4, 2]
    for body in server.bodies:
        assert body["model"] == "tiny"
        assert body["stream_options"] == {"include_usage": True}
        assert (body["temperature"], body["stream"], body["ignore_eos"]) == (0, True, True)
    assert set(server.authorizations) == {"Bearer secret"}
    assert "secret" not in output.read_text()
    printed = capsys.readouterr().out
    for name in ("TTFT", "ITL", "TPOT", "E2E", "concurrent-8", "trace", "3 requests, 0 failed"):
        assert name in printed


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("refuse", "HTTP 400: max_tokens: too many"),
        ("break", "RemoteProtocolError"),
        ("no usage", "no usage in the stream"),
        ("error event", "the engine died"),
    ],
)
def test_failures_are_counted_shown_and_returned(
    server: CompletionsServer, fault: Fault, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Calibration, the first scenario's warm-up and its first request succeed; then everything fails.
    server.fault, server.good_answers = fault, 3
    arguments = f"--base-url {server.base_url} --num-requests 2 --scenario single --scenario long-prefill"
    assert main(arguments.split()) == 1
    printed = capsys.readouterr().out
    assert "2 requests, 1 failed" in printed
    assert "1 requests, 1 failed" in printed  # the warm-up of long-prefill
    assert printed.count(f"failed: {reason}") == 2


def test_ignore_eos_is_left_out_for_servers_that_reject_it(server: CompletionsServer) -> None:
    arguments = (
        f"--base-url {server.base_url} --model other --scenario single --num-requests 1 --no-ignore-eos"
    )
    assert main(arguments.split()) == 0
    assert all("ignore_eos" not in body and body["model"] == "other" for body in server.bodies)


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with running_server() as server:
        base_url = server.base_url
    assert main(["--base-url", base_url]) == 2
    assert "is the server up?" in capsys.readouterr().err


def test_a_server_that_refuses_everything(
    server: CompletionsServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fault = "refuse"
    assert main(["--base-url", server.base_url]) == 2
    assert "max_tokens: too many" in capsys.readouterr().err
