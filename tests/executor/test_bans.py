"""Tokens that a request allows and words that it bans, over a tiny model: kept in any company, and bit for bit."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.core.bans import bitmask_of, completing_tokens
from engine.core.request import Request
from tests.helpers.forms import EOS, Results, alone, ids_of, make_core, make_request, run, text_of, tokens_of
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint

A, B, C, D = ids_of(b"abcd")
WORDS = ((A, B), (C,), (B, D, A), (D, D))

OPTIONS: list[dict[str, Any]] = [
    {"temperature": 1.0, "allowed_token_ids": [A, B, C, D]},
    {"temperature": 1.5, "allowed_token_ids": [A, B, D, *EOS], "n": 2, "min_tokens": 9},
    {
        "temperature": 1.0,
        "allowed_token_ids": [A, B, C, D],
        "repetition_penalty": 1.5,
        "frequency_penalty": 0.3,
    },
    {"temperature": 1.0, "structured_outputs": {"regex": "([a-d]{3}-){8}"}, "logprobs": 1},
    {"temperature": 0, "logit_bias": {A: 40.0, B: 40.0, C: 90.0}, "allowed_token_ids": [B, A, C]},
    {"temperature": 1.0, "structured_outputs": {"regex": "[a-z]+"}, "allowed_token_ids": [A, B, C, D, *EOS]},
]


def make_requests(words: tuple[tuple[int, ...], ...] = WORDS) -> list[Request]:
    source = random.Random(3)
    return [
        replace(
            make_request(
                str(index),
                prompt=[source.randrange(320) for _ in range(source.randrange(1, 24))],
                **OPTIONS[index % len(OPTIONS)],
            ),
            bad_words=words,
        )
        for index in range(12)
    ]


def has_word(token_ids: list[int]) -> bool:
    return any(
        tuple(token_ids[start : start + len(word)]) == word
        for word in WORDS
        for start in range(len(token_ids))
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bans") / "model"
    write_checkpoint(path, TINY_CONFIGS["llama"])
    return path


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Results:
    """Each request by itself, without overlap or prefix cache."""
    return alone(make_core(checkpoint, overlap=False, enable_prefix_caching=False), make_requests())


def test_nothing_comes_but_what_is_allowed(checkpoint: Path, expected: Results) -> None:
    freely = run(make_core(checkpoint), make_requests(words=()))
    for (name, _), result in expected.items():
        allowed = OPTIONS[int(name) % len(OPTIONS)].get("allowed_token_ids", range(320))
        tokens = tokens_of(result)
        assert result[-1][2] is None
        assert tokens
        assert set(tokens) <= set(allowed)
        assert not has_word(tokens)
    # They would come, were they not banned.
    assert sum(has_word(tokens_of(result)) for result in freely.values()) > len(expected) / 2


@pytest.mark.parametrize(
    "options",
    [{"overlap": True}, {"overlap": True, "kv_cache_memory": "80KiB"}, {"max_num_batched_tokens": 16}],
)
def test_the_same_bits_in_company(checkpoint: Path, expected: Results, options: dict[str, Any]) -> None:
    core = make_core(checkpoint, **options)
    assert run(core, make_requests()) == expected
    assert run(core, make_requests()) == expected
    assert ("kv_cache_memory" in options) == (core.stats.num_preemptions > 0)


def test_a_resumed_request_goes_on_with_what_the_other_drew(checkpoint: Path, expected: Results) -> None:
    core = make_core(checkpoint)
    for request in make_requests()[:3]:
        drawn = [tokens_of(expected[request.request_id, index]) for index in range(request.params.n)]
        for cut in (1, 2, 7):
            resumed = replace(request, resumed_token_ids=[tokens[:cut] for tokens in drawn])
            for (_, index), result in run(core, [resumed]).items():
                assert tokens_of(result) == drawn[index][cut:]


def test_words_are_looked_for_in_the_output_alone() -> None:
    words = ((1,), (1, 2), (3, 1, 2), (1, 1))
    assert completing_tokens(words, [3, 1], 0) == (1,)
    assert completing_tokens(words, [3, 1], 1) == (1, 2, 1)
    assert completing_tokens(words, [3, 1], 2) == (1, 2, 2, 1)
    assert completing_tokens(words, [1, 3], 2) == (1,)


def test_masks_have_a_bit_a_token() -> None:
    assert bitmask_of([0, 33, 31, 69, 70], 70).tolist() == [1 - 2**31, 2, 2**5]


def test_a_draw_without_any_token_fails_alone(checkpoint: Path) -> None:
    core = make_core(checkpoint)
    good = make_requests()[0]
    # Known only once a is there.
    stuck = replace(make_request("stuck", allowed_token_ids=[A], temperature=0), bad_words=((A, A),))
    results = run(core, [good, stuck])
    *drawn, (reason, _, error) = results["stuck", 0]
    assert [token for token, _ in drawn] == [A]
    assert reason == "error"
    assert "bad_words" in error
    assert tokens_of(results["0", 0]) == tokens_of(run(core, [good])["0", 0])


def test_a_form_ends_under_allowed_tokens_without_the_end(checkpoint: Path) -> None:
    core = make_core(checkpoint)
    request = make_request("x", structured_outputs={"regex": "[a-z]{5}"}, allowed_token_ids=[A, D])
    ((_, result),) = run(core, [request]).items()
    assert result[-1] == ("stop", True, None)
    assert set(text_of(tokens_of(result))) <= set(b"ad")
