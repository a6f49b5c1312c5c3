"""Outputs in a form, over a tiny model: valid, the same bits in any company and schedule, and late masks."""

from __future__ import annotations

import json
from collections import Counter
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from engine.core import scheduler
from engine.core.request import EngineOutput, Request
from tests.helpers.forms import (
    EOS,
    FORMS,
    NUM_TOKENS,
    PERSON,
    PERSON_FORM,
    VOCABULARY,
    HeldBack,
    Results,
    alone,
    ids_of,
    make_core,
    make_request,
    make_requests,
    run,
    run_with_late_masks,
    text_of,
    tokens_of,
)
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("forms") / "model"
    write_checkpoint(path, TINY_CONFIGS["llama"])
    return path


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Results:
    """Each request by itself, without overlap or prefix cache."""
    return alone(make_core(checkpoint, overlap=False, enable_prefix_caching=False), make_requests())


def test_complete_outputs_have_the_form(expected: Results) -> None:
    num_complete = 0
    for (name, _), result in expected.items():
        form, (reason, is_form_complete, error) = FORMS[int(name) % len(FORMS)], result[-1]
        assert error is None
        if form is None or reason == "length":
            assert not is_form_complete
            continue
        assert (reason, is_form_complete) == ("stop", tokens_of(result)[-1] not in EOS)
        num_complete += 1
        text = text_of(tokens_of(result)).decode()
        if form is PERSON_FORM:
            jsonschema.validate(json.loads(text), PERSON)
        elif "choice" in form:
            assert text in form["choice"]
    assert num_complete > 10


@pytest.mark.parametrize(
    "options",
    [
        {"overlap": False},
        {"overlap": True},
        {"overlap": True, "max_num_batched_tokens": 16},
        {"overlap": False, "kv_cache_memory": "80KiB"},
        {"overlap": True, "kv_cache_memory": "80KiB"},
    ],
)
def test_the_same_bits_in_company(checkpoint: Path, expected: Results, options: dict[str, Any]) -> None:
    core = make_core(checkpoint, **options)
    assert run(core, make_requests()) == expected
    # Once more, over the blocks that are cached by now.
    assert run(core, make_requests()) == expected
    assert core.stats.kv_cache_usage_perc == 0
    if "kv_cache_memory" in options:
        assert core.stats.num_preemptions > 0


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("cache", ["4MiB", "80KiB"])
def test_late_masks_change_no_bit(
    checkpoint: Path, expected: Results, overlap: bool, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MASK_SECONDS", 0.0)
    monkeypatch.setattr(scheduler, "LONELY_MASK_SECONDS", 0.0)
    core = make_core(checkpoint, overlap=overlap, kv_cache_memory=cache)
    assert run_with_late_masks(core) == expected
    assert core.stats.kv_cache_usage_perc == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_a_late_mask_delays_its_row_alone(
    checkpoint: Path, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(checkpoint, overlap=overlap)
    slow = make_request("slow", structured_outputs={"regex": "(ab){30}"}, max_tokens=20)
    quick = make_request("quick", structured_outputs={"regex": "[a-z]{64}"}, max_tokens=20)
    plain = make_request("plain", max_tokens=20, ignore_eos=True)
    requests = [slow, quick, plain]
    expected = alone(make_core(checkpoint, overlap=False), requests)
    held = HeldBack(core, lambda call: slow.params.structured_outputs in call)
    order: list[str] = []
    num_waits: Counter[Future[Any]] = Counter()

    def wait(masks: set[Future[Any]], seconds: float) -> None:
        if seconds == scheduler.MASK_SECONDS:
            num_waits.update(masks)
        futures.wait(masks, seconds)

    monkeypatch.setattr(scheduler, "wait", wait)

    def note(outputs: list[EngineOutput]) -> None:
        order.extend(output.request_id for output in outputs if output.tokens)
        if order.count("plain") == order.count("quick") == 20:
            held.release()

    assert run(core, requests, note) == expected
    # The others drew in every step, and had ended when the slow one began.
    assert "slow" not in order[:40]
    assert order[40:] == ["slow"] * 20
    # They waited for it in their first step alone.
    assert set(num_waits.values()) == {1}


def test_a_form_that_cannot_be_compiled_fails_its_request_alone(checkpoint: Path) -> None:
    core = make_core(checkpoint)
    good, bad = make_requests()[0], make_request("bad", structured_outputs={"grammar": "start: nothing"}, n=2)
    expected = run(make_core(checkpoint), [good])
    results = run(core, [good, bad])
    ((reason, _, error),) = results.pop(("bad", 0))
    assert reason == "error"
    assert "structured_outputs: " in error
    assert "nothing" in error
    assert results == expected


def test_a_form_ends_where_nothing_can_follow(checkpoint: Path) -> None:
    core = make_core(checkpoint)

    def ended(**params: Any) -> tuple[bytes, str, bool]:
        ((_, result),) = run(core, [make_request("x", **params)]).items()
        return text_of(tokens_of(result)), result[-1][0], result[-1][1]

    assert ended(structured_outputs={"choice": ["abc"]}) == (b"abc", "stop", True)
    # Before min_tokens, and with end tokens ignored, it has nothing else to say.
    assert ended(structured_outputs={"choice": ["abc"]}, min_tokens=40) == (b"abc", "stop", True)
    assert ended(structured_outputs={"choice": ["abc"]}, ignore_eos=True) == (b"abc", "stop", True)
    # Its last token is the last that max_tokens allows.
    assert ended(structured_outputs={"regex": "(a){5}"}, max_tokens=5) == (b"aaaaa", "stop", True)
    assert ended(structured_outputs={"regex": "(a){6}"}, max_tokens=5) == (b"aaaaa", "length", False)


def test_end_tokens_come_where_a_form_may_end(checkpoint: Path) -> None:
    core = make_core(checkpoint)
    form = {"regex": "a+"}

    def lengths(**params: Any) -> dict[int, str]:
        requests = [make_request("x" * number, structured_outputs=form, **params) for number in range(1, 9)]
        return {len(result) - 1: result[-1][0] for result in run(core, requests).values()}

    end_likely = dict.fromkeys(EOS, 100.0)
    assert lengths(logit_bias=end_likely) == {2: "stop"}
    assert lengths(logit_bias=end_likely, min_tokens=7) == {8: "stop"}
    assert lengths(logit_bias=end_likely, ignore_eos=True, max_tokens=9) == {9: "length"}
    # The model has no end token at all.
    core = make_core(checkpoint, eos_token_ids=())
    assert lengths(max_tokens=9) == {9: "length"}
    form = {"choice": ["abc"]}
    assert set(lengths().values()) == {"stop"}


def test_tokens_that_stop_a_sequence_stop_a_form(checkpoint: Path) -> None:
    core = make_core(checkpoint)
    (a,) = ids_of(b"a")
    request = make_request(
        "x", structured_outputs={"regex": "[ab]*"}, stop_token_ids=[a], logit_bias={a: 100.0}
    )
    ((_, result),) = run(core, [request]).items()
    assert tokens_of(result) == [a]
    assert result[-1] == ("stop", False, None)
    # Before min_tokens nothing is left of this one.
    request = make_request("x", structured_outputs={"regex": "aa"}, stop_token_ids=[a], min_tokens=2)
    ((_, result),) = run(core, [request]).items()
    assert result[-1][0] == "error"
    assert "stop_token_ids" in result[-1][2]


def test_special_tokens_come_where_a_grammar_names_them(checkpoint: Path) -> None:
    core = make_core(checkpoint)
    grammar = 'start: "ab" <end_of_turn> /[0-9]/ <[1]>'
    # An end token ends the answer where it is drawn, unless it is ignored.
    ((_, result),) = run(core, [make_request("x", structured_outputs={"grammar": grammar})]).items()
    assert tokens_of(result)[-1] == 3
    assert result[-1] == ("stop", False, None)
    request = make_request("x", structured_outputs={"grammar": grammar}, ignore_eos=True)
    ((_, result),) = run(core, [request]).items()
    assert tokens_of(result)[-3] == 3
    assert tokens_of(result)[-1] == 1
    assert result[-1] == ("stop", True, None)


@pytest.mark.parametrize("form", [form for form in FORMS if form is not None])
def test_a_resumed_form_goes_on_as_if_it_had_not_been_interrupted(
    checkpoint: Path, form: dict[str, Any]
) -> None:
    core = make_core(checkpoint)
    request = make_request("x", structured_outputs=form, n=2)
    whole = run(core, [request])
    for most in (1, 2, 5):
        begun = [tokens_of(whole["x", index])[:most] for index in range(2)]
        ended = [len(tokens_of(whole["x", index])) <= most for index in range(2)]
        if all(ended):
            continue
        resumed = [None if end else tokens for end, tokens in zip(ended, begun, strict=True)]
        rest = run(
            core,
            [
                Request(
                    request_id="x",
                    prompt_token_ids=request.prompt_token_ids,
                    params=request.params,
                    seed=request.seed,
                    resumed_token_ids=resumed,
                )
            ],
        )
        for (_, index), result in rest.items():
            assert result == whole["x", index][most:]


def test_ids_without_a_token_are_never_allowed(checkpoint: Path) -> None:
    core = make_core(checkpoint)
    # The model would say nothing else.
    bias = dict.fromkeys(range(NUM_TOKENS - 28, NUM_TOKENS), 100.0)
    request = make_request("x", structured_outputs={"regex": "(.|\n){40}"}, logit_bias=bias, max_tokens=40)
    ((_, result),) = run(core, [request]).items()
    assert np.frombuffer(VOCABULARY.lengths, np.uint32)[tokens_of(result)].all()
