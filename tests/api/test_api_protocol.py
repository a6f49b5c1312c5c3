"""Request bodies, without a server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params

from api.errors import ApiError
from api.protocol import NEUTRAL_VALUES, ChatCompletionRequest, CompletionRequest, decode_request
from engine.core.sampling_params import SAMPLING_PARAMETERS

COMPLETION: dict[str, Any] = {"prompt": "hello"}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
KINDS = [
    (CompletionRequest, COMPLETION, completion_params.CompletionCreateParamsBase),
    (ChatCompletionRequest, CHAT, chat_params.CompletionCreateParamsBase),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(("kind", "body", "official"), KINDS)
def test_every_field_of_the_official_client_is_known(kind, body: dict, official: type) -> None:
    for field in official.__annotations__:
        if field not in body:
            decode_request(json.dumps({**body, field: None}).encode(), kind)


@pytest.mark.parametrize(("kind", "body", "official"), KINDS)
def test_every_sampling_parameter_is_a_field(kind, body: dict, official: type) -> None:
    assert {parameter.name for parameter in SAMPLING_PARAMETERS} <= set(kind.__struct_fields__)
    for parameter in SAMPLING_PARAMETERS:
        decode_request(json.dumps({**body, parameter.name: None}).encode(), kind)


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in NEUTRAL_VALUES.items() for v in vs])
def test_neutral_values_are_accepted(field: str, value: Any) -> None:
    kind, body = (CompletionRequest, COMPLETION) if field == "suffix" else (ChatCompletionRequest, CHAT)
    decode_request(json.dumps({**body, field: value}).encode(), kind)


@given(data=st.data())
@pytest.mark.parametrize(("kind", "body", "official"), KINDS)
def test_any_json_is_a_request_or_a_400(kind, body: dict, official: type, data: st.DataObject) -> None:
    fields = st.sampled_from([*kind.__struct_fields__, "mystery"])
    field, value = data.draw(fields), data.draw(JSON)
    try:
        decode_request(json.dumps({**body, field: value}).encode(), kind)
    except ApiError as error:
        refusal = error
    else:
        return
    assert refusal.status == 400
    assert refusal.param is not None
    assert refusal.param.split(".")[0].split("[")[0] == field


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_a_400(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        decode_request(body, CompletionRequest)
    assert caught.value.status == 400
