"""/v1/completions through the official client."""

from __future__ import annotations

import asyncio

import openai
import pytest

from tests.api.conftest import API_KEY, ServerProcess

PROMPT = "The capital of France is"


def complete(client: openai.OpenAI, **arguments):
    return client.completions.create(**{"model": "llama", "prompt": PROMPT, "temperature": 0, **arguments})


def test_a_completion_has_openais_shape(client: openai.OpenAI) -> None:
    completion = complete(client)
    assert completion.object == "text_completion"
    assert completion.id.startswith("cmpl-")
    assert completion._request_id == completion.id
    assert completion.model == "llama"
    [choice] = completion.choices
    assert "Paris" in choice.text
    assert choice.finish_reason == "length"
    assert choice.logprobs is None
    assert completion.usage.completion_tokens == 16
    assert completion.usage.prompt_tokens == 5
    assert completion.usage.total_tokens == 21


@pytest.mark.parametrize("n", [1, 3])
def test_the_pieces_of_a_stream_make_the_whole(client: openai.OpenAI, n: int) -> None:
    arguments = {"prompt": [PROMPT, "In 2024,"], "n": n, "seed": 3, "temperature": 0.8, "max_tokens": 12}
    whole = complete(client, **arguments)
    texts = [""] * len(whole.choices)
    reasons = [None] * len(whole.choices)
    for chunk in complete(client, **arguments, stream=True):
        [choice] = chunk.choices
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]


def test_choices_are_prompt_major(client: openai.OpenAI) -> None:
    arguments = {"n": 2, "seed": 1, "temperature": 1, "echo": True, "max_tokens": 4}
    completion = complete(client, prompt=["One", "Two", "Three"], **arguments)
    assert [choice.index for choice in completion.choices] == list(range(6))
    first_words = ["One", "One", "Two", "Two", "Three", "Three"]
    for choice, word in zip(completion.choices, first_words, strict=True):
        assert choice.text.startswith(word)


def test_token_ids_are_a_prompt_too(client: openai.OpenAI) -> None:
    from_text = complete(client, extra_body={"return_token_ids": True})
    ids = from_text.choices[0].token_ids
    assert len(ids) == 16
    again = complete(client, prompt=ids, max_tokens=4)
    assert again.usage.prompt_tokens == 16
    several = complete(client, prompt=[ids, ids[:8]], max_tokens=4)
    assert several.usage.prompt_tokens == 24
    assert several.choices[0].text == again.choices[0].text


def test_echo_of_token_ids_is_their_text(client: openai.OpenAI) -> None:
    first = complete(client, extra_body={"return_token_ids": True})
    [choice] = complete(client, prompt=first.choices[0].token_ids, echo=True, max_tokens=2).choices
    assert choice.text.startswith(first.choices[0].text)


def test_logprobs_have_the_legacy_form(client: openai.OpenAI) -> None:
    [choice] = complete(client, logprobs=3, max_tokens=10).choices
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    offsets = [len("".join(logprobs.tokens[:i])) for i in range(10)]
    assert logprobs.text_offset == offsets
    for token, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert len(top) == 3
        assert top[token] == logprob == max(top.values())


def test_zero_logprobs_are_those_of_the_chosen_tokens(client: openai.OpenAI) -> None:
    [choice] = complete(client, logprobs=0, max_tokens=3).choices
    assert [len(top) for top in choice.logprobs.top_logprobs] == [1, 1, 1]


def test_streamed_logprobs_are_those_of_the_whole(client: openai.OpenAI) -> None:
    [whole] = complete(client, logprobs=2, max_tokens=8).choices
    tokens, offsets = [], []
    for chunk in complete(client, logprobs=2, max_tokens=8, stream=True):
        if chunk.choices[0].logprobs is not None:
            tokens += chunk.choices[0].logprobs.tokens
            offsets += chunk.choices[0].logprobs.text_offset
    assert tokens == whole.logprobs.tokens
    assert offsets == whole.logprobs.text_offset


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text(client: openai.OpenAI, keep: bool, stream: bool) -> None:
    stop = complete(client, max_tokens=8).choices[0].text[6:10]
    body = {"include_stop_str_in_output": keep}
    answer = complete(client, max_tokens=8, stop=[stop], stream=stream, extra_body=body)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    text = "".join(choice.text for choice in choices)
    assert choices[-1].finish_reason == "stop"
    assert choices[-1].stop_reason == stop
    assert text.endswith(stop) if keep else stop not in text


def test_a_stop_token_ends_the_text(client: openai.OpenAI) -> None:
    ids = complete(client, extra_body={"return_token_ids": True}).choices[0].token_ids
    body = {"stop_token_ids": [ids[3]], "return_token_ids": True}
    [choice] = complete(client, extra_body=body).choices
    assert (choice.finish_reason, choice.stop_reason) == ("stop", ids[3])
    assert choice.token_ids == ids[: ids.index(ids[3]) + 1]


def test_a_seed_fixes_the_draw(client: openai.OpenAI) -> None:
    first, again, other = (
        complete(client, temperature=1, seed=seed, max_tokens=12).choices[0].text for seed in (7, 7, 8)
    )
    assert first == again != other


def test_logit_bias_forces_a_token(client: openai.OpenAI) -> None:
    [token_id] = complete(client, max_tokens=1, extra_body={"return_token_ids": True}).choices[0].token_ids
    body = {"return_token_ids": True}
    [choice] = complete(client, max_tokens=4, logit_bias={str(token_id): 100}, extra_body=body).choices
    assert choice.token_ids == [token_id] * 4


def test_a_repeated_prompt_comes_from_the_cache(client: openai.OpenAI) -> None:
    prompt = "A list of numbers: " + " ".join(map(str, range(60)))
    first, again = (complete(client, prompt=prompt, max_tokens=4) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert 0 < again.usage.prompt_tokens_details.cached_tokens < again.usage.prompt_tokens
    assert again.choices[0].text == first.choices[0].text


def test_what_samples_share_is_not_counted_as_cached(client: openai.OpenAI) -> None:
    prompt = "Another list of numbers: " + " ".join(map(str, range(70, 130)))
    completion = complete(client, prompt=prompt, max_tokens=2, n=3)
    assert completion.usage.prompt_tokens_details.cached_tokens == 0


def test_neutral_and_harmless_fields_are_accepted(client: openai.OpenAI) -> None:
    completion = complete(client, best_of=1, suffix="", user="somebody", max_tokens=1, stop=None)
    assert completion.usage.completion_tokens == 1


@pytest.mark.anyio
async def test_concurrent_streams_do_not_mix(server: ServerProcess, client: openai.OpenAI) -> None:
    prompts = [f"Count: {i}, {i + 1}, {i + 2}," for i in range(8)]

    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0) as eager:

        async def stream(prompt: str) -> str:
            chunks = await eager.completions.create(
                model="llama", prompt=prompt, max_tokens=16, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in chunks])

        texts = await asyncio.gather(*map(stream, prompts))
    for prompt, text in zip(prompts, texts, strict=True):
        assert text == complete(client, prompt=prompt).choices[0].text


def test_bad_words_and_allowed_tokens(client: openai.OpenAI) -> None:
    free = complete(client, extra_body={"return_token_ids": True}).choices[0]
    assert "Paris" in free.text
    assert "Paris" not in complete(client, extra_body={"bad_words": ["Paris"]}).choices[0].text
    allowed = free.token_ids[1:4]
    extra = {"allowed_token_ids": allowed, "return_token_ids": True, "bad_words": None}
    assert set(complete(client, extra_body=extra).choices[0].token_ids) <= set(allowed)
