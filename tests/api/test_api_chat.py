"""/v1/chat/completions through the official client."""

from __future__ import annotations

import openai
import pytest

QUESTION = {"role": "user", "content": "What is the capital of France?"}


def chat(client: openai.OpenAI, *messages: object, **arguments):
    arguments = {"model": "llama", "temperature": 0, "max_completion_tokens": 24, **arguments}
    return client.chat.completions.create(messages=list(messages) or [QUESTION], **arguments)


def test_a_chat_completion_has_openais_shape(client: openai.OpenAI) -> None:
    completion = chat(client)
    assert completion.object == "chat.completion"
    assert completion.id.startswith("chatcmpl-")
    [choice] = completion.choices
    assert choice.message.role == "assistant"
    assert "Paris" in choice.message.content
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    assert (
        completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
    )


def test_the_length_is_the_contexts_unless_given(client: openai.OpenAI) -> None:
    completion = chat(client, max_completion_tokens=None)
    assert completion.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_limit_work(client: openai.OpenAI, limit: str) -> None:
    arguments = {"max_completion_tokens": None, limit: 3}
    completion = chat(client, **arguments)
    assert completion.usage.completion_tokens == 3
    assert completion.choices[0].finish_reason == "length"


def test_an_answer_can_be_sent_back(client: openai.OpenAI) -> None:
    answer = chat(client).choices[0].message
    completion = chat(client, QUESTION, answer, {"role": "user", "content": "And of Italy?"})
    assert completion.choices[0].message.content


def test_parts_and_developer_are_text_and_system(client: openai.OpenAI) -> None:
    text = "What is the capital of France?"
    plain = chat(client, {"role": "system", "content": "Be brief."}, {"role": "user", "content": text})
    parts = [{"type": "text", "text": text}]
    other = chat(client, {"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts})
    assert other.choices[0].message.content == plain.choices[0].message.content
    assert other.usage.prompt_tokens == plain.usage.prompt_tokens


def test_logprobs_have_the_chat_form(client: openai.OpenAI) -> None:
    [choice] = chat(client, logprobs=True, top_logprobs=2, max_completion_tokens=6).choices
    assert len(choice.logprobs.content) == 6
    whole = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
    assert whole.decode() == choice.message.content
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == entry.logprob <= 0


def test_logprobs_without_top_logprobs(client: openai.OpenAI) -> None:
    [choice] = chat(client, logprobs=True, max_completion_tokens=2).choices
    assert [entry.top_logprobs for entry in choice.logprobs.content] == [[], []]


def test_the_generation_prompt_can_be_left_out(client: openai.OpenAI) -> None:
    whole = chat(client, max_completion_tokens=1).usage.prompt_tokens
    without = chat(client, max_completion_tokens=1, extra_body={"add_generation_prompt": False})
    assert without.usage.prompt_tokens < whole


def test_a_final_message_can_be_continued(client: openai.OpenAI) -> None:
    begun = {"role": "assistant", "content": "The capital of France is"}
    completion = chat(client, QUESTION, begun, extra_body={"continue_final_message": True})
    assert completion.choices[0].message.content.startswith(" Paris")


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_is_role_content_finish_usage(client: openai.OpenAI, n: int) -> None:
    arguments = {"n": n, "temperature": 0.7, "seed": 5}
    whole = chat(client, **arguments)
    chunks = list(chat(client, **arguments, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    *chunks, last = chunks
    assert last.choices == []
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks)
    for index in range(n):
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        first, *contents, finish = choices
        assert (first.delta.role, first.delta.content) == ("assistant", "")
        assert (finish.delta.role, finish.delta.content) == (None, None)
        assert finish.finish_reason == whole.choices[index].finish_reason
        assert all(choice.finish_reason is None for choice in choices[:-1])
        text = "".join(choice.delta.content for choice in contents)
        assert text == whole.choices[index].message.content


def test_usage_can_come_with_every_chunk(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(chat(client, stream=True, stream_options=options, max_completion_tokens=5))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 5


def test_neutral_and_harmless_fields_are_accepted(client: openai.OpenAI) -> None:
    completion = chat(
        client,
        max_completion_tokens=1,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        modalities=["text"],
        parallel_tool_calls=True,
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        user="somebody",
    )
    assert completion.usage.completion_tokens == 1


def test_bad_words(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "What is the capital of Japan?"}]
    arguments = {"model": "llama", "messages": messages, "max_tokens": 20, "temperature": 0}
    contents = [
        client.chat.completions.create(**arguments, extra_body=extra).choices[0].message.content
        for extra in ({}, {"bad_words": ["Tokyo"]})
    ]
    assert ["Tokyo" in content for content in contents] == [True, False]
