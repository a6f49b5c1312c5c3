"""What forms of answers cost: `python -m benchmarks.structured --help`.

The time of a mask, for each token of answers to the schemas of the tests, which the model itself gave under them, and
of calls of tools with these schemas, required and free to come; and the tokens/s of constrained streams beside the
same ones without a form, in turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

from benchmarks.machine import describe_run
from benchmarks.prompts import WORDS
from benchmarks.report import format_table, write_json
from benchmarks.serving import positive_int
from engine import LLM, SamplingParams
from engine.core.grammar import Grammars
from engine.core.structured_outputs import StructuredOutputs
from engine.errors import EngineError
from engine.frontend.chat_format import ChatFormat
from engine.frontend.tool_formats.format import Tool
from engine.frontend.tools import ToolChoice
from engine.loading.resolve import resolve_model
from engine.tokenizer.tokenizer import Tokenizer, load_tokenizer

SCHEMAS = Path(__file__).parent.parent / "tests" / "frontend" / "api_schemas.jsonl"

STREAM = {
    "type": "array",
    "minItems": 100,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "city": {"enum": ["Paris", "Zürich", "東京"]},
        },
        "required": ["name", "age", "city"],
        "additionalProperties": False,
    },
}
"""A form that does not end."""


def read_forms() -> list[StructuredOutputs]:
    """The schemas that the engine keeps."""
    entries = map(json.loads, SCHEMAS.read_text().splitlines())
    return [
        StructuredOutputs(json=entry["schema"], whitespace_pattern=" ?")
        for entry in entries
        if "refused" not in entry
    ]


def tool_forms(
    tokenizer: Tokenizer, forms: Sequence[StructuredOutputs], mode: Literal["auto", "required"]
) -> list[StructuredOutputs]:
    """The forms of answers that call a tool with these schemas."""
    chat_format = ChatFormat(tokenizer)
    found = []
    for form in forms:
        tool = Tool("answer", form.schema)
        turn = chat_format.turn([{"role": "user", "content": "Hello"}], [tool], ToolChoice(mode))
        assert turn.form is not None
        found.append(turn.form)
    return found


def answers(llm: LLM, forms: Sequence[StructuredOutputs], max_tokens: int) -> list[str]:
    """What the model says in each form."""
    params = [
        SamplingParams(structured_outputs=form, max_tokens=max_tokens, seed=number, skip_special_tokens=False)
        for number, form in enumerate(forms)
    ]
    prompts = ["Here is an example of the data as JSON:\n"] * len(forms)
    ends = [llm.tokenizer.decode([token], skip_special_tokens=False) for token in llm.tokenizer.eos_token_ids]
    texts = [result.outputs[0].text for result in llm.generate(prompts, params, use_tqdm=False)]
    return [text.removesuffix(next(filter(text.endswith, ends), "")) for text in texts]


def mask_times(
    tokenizer: Tokenizer, forms: Sequence[StructuredOutputs], texts: Sequence[str]
) -> dict[str, float]:
    """Statistics of single masks in milliseconds, one for each token of the texts.

    It is the time that the thread has a core: what it takes on an idle machine, measured on any.
    """
    grammars = Grammars(tokenizer.vocab_size, tokenizer.eos_token_ids)
    grammars.vocabulary = tokenizer.vocabulary()
    mask = np.empty(grammars.num_words, np.int32)
    compiling, filling = [], []
    for form, text in zip(forms, texts, strict=True):
        start = time.thread_time()
        matcher = grammars.match(form)
        compiling.append(time.thread_time() - start)
        for token_id in tokenizer.encode(text, add_special_tokens=False):
            start = time.thread_time()
            matcher.fill(mask)
            filling.append(time.thread_time() - start)
            matcher.consume(token_id)
    grammars.close()
    # The first of all waits for the tokenizer.
    compiled, filled = 1000 * np.array(compiling[1:]), 1000 * np.array(filling)
    return {
        "vocab_size": tokenizer.vocab_size,
        "num_forms": len(forms),
        "num_masks": len(filling),
        "median_ms": float(np.median(filled)),
        "p99_ms": float(np.percentile(filled, 99)),
        "max_ms": float(filled.max()),
        "compile_median_ms": float(np.median(compiled)),
        "compile_max_ms": float(compiled.max()),
    }


def stream_rates(llm: LLM, num_streams: int, num_tokens: int, repeat: int) -> list[dict[str, float]]:
    """Tokens/s of the streams with and without a form, in turns; a warm-up goes before."""
    prompts = [f"{word.title()} people and where they live:\n" for word in WORDS[:num_streams]]
    plain: dict[str, Any] = {"max_tokens": num_tokens, "ignore_eos": True, "seed": 0}
    kinds = {
        "plain": SamplingParams(**plain),
        "constrained": SamplingParams(
            **plain, structured_outputs=StructuredOutputs(json=STREAM, whitespace_pattern=" ?")
        ),
    }
    rates = []
    for _ in range(repeat + 1 if repeat else 0):
        rate = {}
        for name, params in kinds.items():
            start = time.perf_counter()
            results = llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - start
            rate[name] = sum(len(result.outputs[0].token_ids) for result in results) / seconds
        rates.append(rate)
    return rates[1:]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama", help="whose answers and streams they are")
    parser.add_argument("--quant", default="int8")
    parser.add_argument(
        "--tokenizer", nargs="*", default=[], help="further models whose vocabularies are measured"
    )
    parser.add_argument("--answer-tokens", type=positive_int, default=150, help="most tokens of an answer")
    parser.add_argument("--streams", type=positive_int, default=8)
    parser.add_argument("--stream-tokens", type=positive_int, default=128)
    parser.add_argument("--repeat", type=int, default=7, help="turns of the streams; 0: masks alone")
    parser.add_argument("--output", type=Path, help="JSON file for all numbers")
    arguments = parser.parse_args(words)
    try:
        forms = read_forms()
        llm = LLM(arguments.model, quant=arguments.quant, kv_cache_memory="256MiB")
        rates = stream_rates(llm, arguments.streams, arguments.stream_tokens, arguments.repeat)
        texts = answers(llm, forms, arguments.answer_tokens)
        calls = answers(llm, tool_forms(llm.tokenizer, forms, "required"), arguments.answer_tokens)
        masks = {}
        for name in (arguments.model, *arguments.tokenizer):
            tokenizer = load_tokenizer(resolve_model(name))
            masks[name] = mask_times(tokenizer, forms, texts)
            # A model without a chat template calls no tools.
            for mode in ("required", "auto") if tokenizer.has_chat_template else ():
                masks[f"{name}, tools {mode}"] = mask_times(
                    tokenizer, tool_forms(tokenizer, forms, mode), calls
                )
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows = [
        [name, f"{one['vocab_size']:.0f}", *(f"{one[key]:.3f}" for key in ("median_ms", "p99_ms", "max_ms"))]
        for name, one in masks.items()
    ]
    print(format_table(["tokenizer", "vocabulary", "median ms", "p99 ms", "max ms"], rows))
    result: dict[str, Any] = {"masks": masks}
    if rates:
        result |= {"streams": rates, "ratio": report_rates(rates, arguments.streams)}
    if arguments.output is not None:
        write_json(arguments.output, {"benchmark": "structured", **describe_run(sys.argv[1:]), **result})
    return 0


def report_rates(rates: list[dict[str, float]], num_streams: int) -> float:
    """Prints the streams' tokens/s; returns how many times as fast they are in a form."""
    ratio = median(rate["constrained"] / rate["plain"] for rate in rates)
    speeds = {name: median(rate[name] for rate in rates) for name in ("plain", "constrained")}
    print(f"{num_streams} streams: {speeds['plain']:.1f} tokens/s, in a form {speeds['constrained']:.1f}")
    print(f"ratio within a turn, median of {len(rates)}: {ratio:.3f}")
    return ratio


if __name__ == "__main__":
    sys.exit(main())
