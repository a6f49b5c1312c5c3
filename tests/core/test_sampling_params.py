"""Every refusal of SamplingParams names its field and its limit."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from engine.core.sampling_params import EXAMPLES, SAMPLING_PARAMETERS, SamplingParams
from engine.errors import RequestError


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("n", 0, "between 1 and 128"),
        ("max_tokens", 0, "at least 1"),
        ("min_tokens", -1, "at least 0"),
        ("temperature", -0.1, "between 0.0 and 2.0"),
        ("temperature", math.nan, "between 0.0 and 2.0"),
        ("top_k", -2, "at least 0"),
        ("top_p", -0.1, "between 0 and 1, got -0.1"),
        ("top_p", math.nan, "between 0 and 1"),
        ("min_p", 1.5, "between 0.0 and 1.0"),
        ("repetition_penalty", 5e-324, "between 0.01 and 10, got 5e-324"),
        ("repetition_penalty", 10.5, "between 0.01 and 10"),
        ("presence_penalty", 2.5, "between -2.0 and 2.0"),
        ("frequency_penalty", -2.5, "between -2.0 and 2.0"),
        ("seed", 2**63, "between"),
        ("logprobs", 21, "between 0 and 20"),
        ("stop", ("",), "non-empty"),
        ("stop", ("a",) * 65, "at most 64"),
        ("stop", ("a" * 1025,), "at most 1024 characters"),
        ("stop_token_ids", (1,) * 1025, "at most 1024"),
        ("logit_bias", dict.fromkeys(range(301), 1.0), "at most 300"),
        ("allowed_token_ids", range(2**18 + 1), "at most 262144"),
        ("logit_bias", {3: 101.0}, "between -100 and 100"),
        ("min_tokens", 17, "max_tokens"),
    ],
)
def test_out_of_range(field: str, value: Any, limit: str) -> None:
    with pytest.raises(RequestError, match=limit) as raised:
        SamplingParams(**{field: value})
    assert raised.value.field == field
    assert field in str(raised.value)


def test_spellings_are_brought_to_one_form() -> None:
    assert SamplingParams(stop="\n").stop == ("\n",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
    assert SamplingParams(stop=None).stop == ()  # type: ignore[arg-type]
    assert SamplingParams(top_k=-1).top_k == 0


def test_it_travels() -> None:
    params = SamplingParams(stop=("x",), logit_bias={5: -1.0}, seed=-3, logprobs=2)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_none_is_refused_but_where_it_stands_for_something() -> None:
    optional = {"max_tokens", "seed", "logprobs", "prompt_logprobs"}
    for parameter in SAMPLING_PARAMETERS:
        if parameter.name in optional:
            assert getattr(SamplingParams(**{parameter.name: None}), parameter.name) is None
        elif parameter.limits is not None:
            with pytest.raises(RequestError, match=f"{parameter.name} must be .*, got None"):
                SamplingParams(**{parameter.name: None})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", "0.5", "a number, got '0.5'"),
        ("top_p", None, "a number, got None"),
        ("max_tokens", 4.0, "an integer, got 4.0"),
        ("max_tokens", True, "an integer, got True"),
        ("ignore_eos", 1, "True or False, got 1"),
        ("seed", "7", "an integer, got '7'"),
        ("stop", 5, "must hold strings, got 5"),
        ("stop", [b"x"], "non-empty strings"),
        ("stop_token_ids", 5, "token ids, got 5"),
        ("stop_token_ids", ["a"], "token ids"),
        ("allowed_token_ids", [], "at least one"),
        ("allowed_token_ids", [1.5], "token ids"),
        ("bad_words", [""], "non-empty"),
        ("bad_words", ["a"] * 65, "at most 64 strings, got 65"),
        ("bad_words", ["a" * 1025], "at most 1024 characters, got one of 1025"),
        ("logit_bias", [5], "a dictionary of numbers by token id"),
        ("logit_bias", {"5": 1.0}, "numbers by token id, got 1.0 for '5'"),
        ("logit_bias", {5: "1"}, "numbers by token id, got '1' for 5"),
    ],
)
def test_other_types_are_named(field: str, value: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words) as raised:
        SamplingParams(**{field: value})
    assert raised.value.field == field


def test_what_is_given_is_copied_and_has_plain_types() -> None:
    stop, ids, bias = ["a"], [3], {5: 1}
    params = SamplingParams(
        stop=stop,  # type: ignore[arg-type]
        stop_token_ids=ids,  # type: ignore[arg-type]
        logit_bias=bias,  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        max_tokens=np.int64(4),  # type: ignore[arg-type]
        top_p=1,
    )
    stop.append("b"), ids.append(4), bias.update({6: 1})
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("a",), (3,), {5: 1.0})
    assert [type(value) for value in (params.temperature, params.max_tokens, params.top_p)] == [
        float,
        int,
        float,
    ]


def test_top_p_of_0_is_greedy() -> None:
    assert SamplingParams(temperature=1.0, top_p=0).is_greedy
    assert not SamplingParams(temperature=1.0, top_p=0.01).is_greedy


def test_the_list_is_of_all_parameters_and_its_examples_are_valid() -> None:
    assert tuple(parameter.name for parameter in SAMPLING_PARAMETERS) == SamplingParams.__slots__
    recommended = {parameter.name for parameter in SAMPLING_PARAMETERS if parameter.is_recommended}
    assert recommended == {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
    neutral, changed = SamplingParams(), SamplingParams(**EXAMPLES)
    assert all(getattr(neutral, name) != getattr(changed, name) == value for name, value in EXAMPLES.items())
