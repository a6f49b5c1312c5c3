"""A real engine whose answers a script says: for agents, which need a model that knows what it does.

Scheduler, caches, tokenizer, chat template, grammars and the forward pass of a model of one layer are the engine's
own; only the tokens that are drawn are the script's (`tests.agents.scripted_process`).
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, cast

import httpx

from engine.config import EngineConfig
from engine.core.outputs import RequestOutput
from engine.core.sampling_params import SamplingParams
from engine.frontend.async_engine import AsyncEngine
from engine.loading.resolve import resolve_model
from engine.tokenizer.files import read_tokenizer
from tests.helpers.scripted import serving

CONTEXT = 131072
"""Tokens that the model's context holds, as those of models that agents are used with."""

Script = Callable[[str], str]
"""From a prompt's text to the answer's."""


@dataclass(slots=True)
class Turn:
    """A request, as the engine saw it.

    Attributes:
        num_cached_tokens: Prompt tokens that the scheduler found in its cache.
    """

    prompt: str
    answer: str
    num_prompt_tokens: int
    num_cached_tokens: int = 0

    @property
    def cached_share(self) -> float:
        return self.num_cached_tokens / self.num_prompt_tokens


class ScriptedEngine(AsyncEngine):
    """Answers as `script` says.

    Args:
        directory: Of a model, see `write_model`; the answers lie there, too.

    Attributes:
        script: May be replaced between requests.
        turns: The requests so far.
    """

    def __init__(self, directory: Path, script: Script, **options: Any) -> None:
        config = EngineConfig(
            model=str(directory),
            load_format="dummy",
            quant="int8",
            kv_cache_memory="64MiB",
            max_model_len=CONTEXT,
            **options,
        )
        super().__init__(
            config, command=(sys.executable, "-m", "tests.agents.scripted_process", str(directory))
        )
        self._answers, self._numbers = directory, count()
        self.script = script
        self.turns: list[Turn] = []

    async def generate(
        self,
        prompt: str | list[int],
        params: SamplingParams,
        request_id: str,
        priority: int = 0,
        resumed_token_ids: Sequence[list[int] | None] = (),
        **options: Any,
    ) -> AsyncGenerator[RequestOutput]:
        assert isinstance(prompt, list)
        text = self.tokenizer.decode(prompt, skip_special_tokens=False)
        turn = Turn(text, self.script(text), len(prompt))
        self.turns.append(turn)
        answer = [
            *self.tokenizer.encode(turn.answer, add_special_tokens=False),
            self.tokenizer.eos_token_ids[0],
        ]
        seed = next(self._numbers)
        (self._answers / str(seed)).write_text(json.dumps(answer))
        async for output in super().generate(
            prompt, replace(params, seed=seed), request_id, priority, **options
        ):
            turn.num_cached_tokens = max(turn.num_cached_tokens, output.num_cached_tokens)
            yield output


def write_model(directory: Path) -> Path:
    """A model of one layer with SmolLM2's tokenizer and chat template, and no weights."""
    backend, settings = read_tokenizer(resolve_model("llama"))
    backend.save(str(directory / "tokenizer.json"))
    template = {"chat_template": settings.chat_templates["default"]}
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings.special_tokens, **template}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "eos_token_id": list(settings.eos_token_ids),
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@asynccontextmanager
async def agent_server(
    directory: Path, script: Script, **options: Any
) -> AsyncIterator[tuple[ScriptedEngine, httpx.AsyncClient]]:
    """The engine, and a client of the API in front of it, which other processes reach at the client's base_url."""
    engine = ScriptedEngine(write_model(directory), script, **options)
    try:
        await engine.start()
        async with serving(cast(Any, engine)) as client:
            yield engine, client
    finally:
        await engine.shutdown()


@contextmanager
def agent_server_in_thread(
    directory: Path, script: Script, **options: Any
) -> Iterator[tuple[ScriptedEngine, str]]:
    """The engine, and the API's URL, for clients that are not asynchronous."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = agent_server(directory, script, **options)
    try:
        engine, client = asyncio.run_coroutine_threadsafe(server.__aenter__(), loop).result()
        try:
            yield engine, str(client.base_url)
        finally:
            asyncio.run_coroutine_threadsafe(server.__aexit__(None, None, None), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def by_results(answers: Sequence[str]) -> Script:
    """The answer whose number is how many results of tools the prompt holds; the last one for more."""

    def script(prompt: str) -> str:
        return answers[min(prompt.count("<tool_response>\n"), len(answers) - 1)]

    return script
