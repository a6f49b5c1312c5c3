"""A vocabulary of bytes and short texts for the tiny models, which have no tokenizer; and requests with forms."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.core.engine_core import EngineCore
from engine.core.grammar import Grammar
from engine.core.matcher import Vocabulary
from engine.core.request import EngineOutput, Request
from engine.core.sampling_params import SamplingParams
from engine.executor.start import start_engine

NUM_TOKENS = 320
EOS = (2, 3)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<end_of_turn>")
TEXTS = (
    '{"',
    '":',
    '": "',
    '", "',
    '"}',
    "true",
    "false",
    "null",
    "], [",
    "ab",
    "abc",
    " a",
    "日本",
    "日",
    "12",
    "00",
)

_TOKENS = [*(text.encode() for text in (*SPECIAL, *TEXTS)), *(bytes([byte]) for byte in range(256))]

VOCABULARY = Vocabulary.of([*_TOKENS, *([b""] * (NUM_TOKENS - 8 - len(_TOKENS)))], range(len(SPECIAL)))
"""The last ids have no token, and eight more are beyond it: a model's logits are wider than its tokenizer."""


def text_of(token_ids: list[int]) -> bytes:
    """What the tokens say, special ones left out."""
    return b"".join(_TOKENS[token_id] for token_id in token_ids if token_id >= len(SPECIAL))


def ids_of(text: bytes) -> list[int]:
    """A token a byte."""
    return [len(_TOKENS) - 256 + byte for byte in text]


PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "city": {"enum": ["日本", "Zürich", "😀"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
PERSON_FORM = {"json": PERSON, "whitespace_pattern": " ?"}

FORMS: list[dict[str, Any] | None] = [
    PERSON_FORM,
    {"regex": r"[a-f]{2,9}(-[0-9]{3}){1,4}"},
    None,
    {"choice": ["yes", "no", "may be 😀", "日本語"]},
    {"grammar": 'start: "(" item ("," item)* ")"\nitem: /[0-9]{1,3}/ | "(" item ")"'},
    {"grammar": 'root ::= ("ab" | "c")+ "!" <|x|>?'.replace(" <|x|>?", "")},
]
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0},
    {"temperature": 1.3, "n": 3},
    {"temperature": 1.0, "repetition_penalty": 1.5, "frequency_penalty": 0.5, "logprobs": 2},
    {"temperature": 1.0, "min_tokens": 12, "top_p": 0.9},
    {"temperature": 0.8, "logit_bias": {ids_of(b"a")[0]: 5.0, ids_of(b'"')[0]: 8.0}, "top_k": 20},
]

Results = dict[tuple[str, int], list[Any]]


def make_core(path: Path, eos_token_ids: tuple[int, ...] = EOS, **options: Any) -> EngineCore[Any]:
    options = {"kv_cache_memory": "4MiB", "num_threads": 1, "max_num_seqs": 8, "max_model_len": 72, **options}
    core = start_engine(EngineConfig(model=str(path), device="cpu", **options), path, eos_token_ids)
    core.grammars.vocabulary = VOCABULARY
    return core


def make_requests() -> list[Request]:
    source = random.Random(1)
    return [
        make_request(
            str(index),
            prompt=[source.randrange(320) for _ in range(source.randrange(1, 24))],
            structured_outputs=FORMS[index % len(FORMS)],
            **OPTIONS[index % 5],
        )
        for index in range(18)
    ]


def make_request(request_id: str, prompt: list[int] | None = None, **params: Any) -> Request:
    params = {"max_tokens": 48, **params}
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt or [7, 8, 9],
        params=SamplingParams(**params),
        seed=len(request_id) + hash(params["max_tokens"]),
    )


def run(
    core: EngineCore[Any], requests: list[Request], after_step: Callable[[list[EngineOutput]], None] = list
) -> Results:
    """Each sample's tokens with their log-probabilities, then how it ended."""
    results: Results = defaultdict(list)
    for request in requests:
        core.add_request(request)
    while core.has_work:
        outputs = core.step()
        for output in outputs:
            key = (output.request_id, output.index)
            results[key] += [(token.token_id, token.logprob) for token in output.tokens]
            if output.finish_reason is not None:
                results[key].append((output.finish_reason, output.is_form_complete, output.error))
        after_step(outputs)
    return results


def tokens_of(result: list[Any]) -> list[int]:
    return [token_id for token_id, _ in result[:-1]]


def alone(core: EngineCore[Any], requests: list[Request]) -> Results:
    results: Results = {}
    for request in requests:
        results |= run(core, [request])
    return results


class HeldBack:
    """Has the masks of some sequences come when the test says so."""

    def __init__(self, core: EngineCore[Any], is_held: Callable[[tuple[Any, ...]], bool]) -> None:
        self._waiting: list[Callable[[], None]] = []
        grammars = core.grammars
        self._submit, self._start_masks, self._is_held = grammars.submit, grammars.start_masks, is_held
        grammars.submit = self.submit  # type: ignore[method-assign]
        grammars.start_masks = self.start_masks  # type: ignore[method-assign]

    def submit(self, function: Any, *arguments: Any) -> Future[Any]:
        if not self._is_held((function, *arguments)):
            return self._submit(function, *arguments)
        future: Future[Any] = Future()
        self._waiting.append(lambda: future.set_result(function(*arguments)))
        return future

    def start_masks(self, grammars: Sequence[Grammar]) -> None:
        held = [grammar for grammar in grammars if self._is_held((grammar,))]
        for grammar in held:
            grammar.mask = Future()
            self._waiting.append(grammar.fill_mask)
        self._start_masks([grammar for grammar in grammars if grammar not in held])

    def release(self) -> None:
        waiting, self._waiting = self._waiting, []
        for complete in waiting:
            complete()

    def __bool__(self) -> bool:
        return bool(self._waiting)


def run_with_late_masks(core: EngineCore[Any]) -> Results:
    """The requests, where two masks of five come steps after they were asked for; the caller has steps not wait."""
    source, step = random.Random(2), 0
    held = HeldBack(core, lambda call: source.random() < 0.4)

    def release_sometimes(outputs: list[EngineOutput]) -> None:
        nonlocal step
        step += 1
        if step % 3 == 0:
            held.release()

    results = run(core, make_requests(), release_sometimes)
    assert not held
    return results
