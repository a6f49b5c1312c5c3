"""Text from tokens: stop strings across token borders, what is held back, and log-probabilities."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core.outputs import CompletionOutput
from engine.core.request import EngineOutput, Request, SampledToken
from engine.core.sampling_params import SamplingParams
from engine.frontend.output_processor import OutputProcessor, find_stop, len_stop_prefix
from engine.loading.resolve import resolve_model
from engine.tokenizer.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(resolve_model("llama"))


def stream(
    tokenizer: Tokenizer, text: str, last: str | None = "length", **params: object
) -> tuple[list[CompletionOutput], OutputProcessor]:
    """What comes out as the tokens of `text` come in, one at a time."""
    request = Request(
        request_id="r",
        prompt_token_ids=tokenizer.encode("A"),
        params=SamplingParams(**params),  # type: ignore[arg-type]
        seed=0,
    )
    processor = OutputProcessor(request, "A", tokenizer)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    results = []
    for i, token_id in enumerate(token_ids):
        is_last = i == len(token_ids) - 1
        output = EngineOutput(
            request_id="r",
            index=0,
            tokens=[SampledToken(token_id, -0.5, 1, [(token_id, -0.5), (5, -2.0)])],
            finish_reason=last if is_last else None,  # type: ignore[arg-type]
        )
        addition = processor.process(output)
        if addition is not None:
            results += addition.outputs
    return results, processor


def test_text_streams_as_tokens_come(tokenizer: Tokenizer) -> None:
    results, _ = stream(tokenizer, "The capital of France is Paris.")
    assert "".join(result.text for result in results) == "The capital of France is Paris."
    assert len(results) > 5
    assert all(result.text for result in results)
    assert results[-1].finish_reason == "length"


@pytest.mark.parametrize("stop", [" of France", "capital", "l of Fr", "The"])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_text_wherever_tokens_break(
    tokenizer: Tokenizer, stop: str, include: bool
) -> None:
    text = "The capital of France is Paris."
    results, processor = stream(tokenizer, text, stop=(stop, "zzz"), include_stop_str_in_output=include)
    streamed = "".join(result.text for result in results)
    assert streamed == text[: text.index(stop)] + (stop if include else "")
    assert (results[-1].finish_reason, results[-1].stop_reason) == ("stop", stop)
    assert processor.stopped_samples == [0]


def test_what_cannot_start_a_stop_string_is_not_held_back(tokenizer: Tokenizer) -> None:
    results, _ = stream(tokenizer, "The capital of France is Paris.", stop=("Paris!",))
    assert "".join(result.text for result in results) == "The capital of France is Paris."
    assert [result.text for result in results][:3] == ["The", " capital", " of"]


def test_stop_strings_wait_for_min_tokens(tokenizer: Tokenizer) -> None:
    results, _ = stream(tokenizer, " a a a a a", stop=(" a",), min_tokens=3)
    assert "".join(result.text for result in results) == " a a"


def test_the_stop_token_is_not_text(tokenizer: Tokenizer) -> None:
    results, _ = stream(tokenizer, "one two", last="stop")
    assert "".join(result.text for result in results) == "one"
    assert sum(len(result.token_ids) for result in results) == 2


def test_logprobs_name_the_chosen_token_first(tokenizer: Tokenizer) -> None:
    results, _ = stream(tokenizer, "é", logprobs=2)
    entries = [entry for result in results for entry in result.logprobs or []]
    assert b"".join(next(iter(entry.values())).token_bytes for entry in entries) == "é".encode()
    assert [value.rank for value in entries[0].values()] == [1, 2]


def test_an_error_ends_the_request(tokenizer: Tokenizer) -> None:
    request = Request(request_id="r", prompt_token_ids=[1], params=SamplingParams(n=2), seed=0)
    processor = OutputProcessor(request, None, tokenizer)
    output = processor.process(EngineOutput(request_id="r", index=1, finish_reason="error", error="broken"))
    assert output is not None
    assert output.finished
    assert output.error == "broken"
    assert output.outputs[0].finish_reason == "error"


alphabet = st.text("ab", min_size=1, max_size=5)


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=12), stops=st.lists(alphabet, min_size=1, max_size=3)
)
def test_streamed_matching_equals_matching_the_whole_text(pieces: list[str], stops: list[str]) -> None:
    """Held back and searched piece by piece, the text ends where a search over all of it would end it.

    The earliest end of any match decides, as the stream cannot know what follows; of several that are
    complete by then, the one that begins first.
    """
    known = tuple(stops)
    emitted, held, found = "", "", None
    for piece in pieces:
        text = held + piece
        found = find_stop(text, known)
        if found is not None:
            emitted += text[: found[0]]
            break
        keep = len(text) - len_stop_prefix(text, known)
        emitted, held = emitted + text[:keep], text[keep:]
    whole = "".join(pieces)
    if found is None:
        assert emitted + held == whole
        assert all(stop not in whole for stop in known)
    else:
        assert whole.startswith(emitted + found[1])
        assert all(stop not in emitted for stop in known)
