"""LLM: offline generation in this process."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, Self

from tqdm import tqdm

from engine.cache_directory import caching_in
from engine.config import EngineConfig
from engine.core.batch import Pooling
from engine.core.engine_core import EngineCore
from engine.core.outputs import CompletionOutput, EmbeddingRequestOutput, RequestOutput, Score
from engine.core.pooling_params import PoolingParams
from engine.core.random import request_seed
from engine.core.request import Request
from engine.core.sampling_params import SamplingParams
from engine.core.validation import validate_embedding, validate_request
from engine.errors import ConfigError, EngineError, RequestError
from engine.executor.start import start_engine
from engine.frontend.chat_format import ChatFormat
from engine.frontend.embedding import EmbeddingProcessor, embedding_request
from engine.frontend.grammar import FormChecker
from engine.frontend.output_processor import OutputProcessor
from engine.frontend.prompts import Prompt, read_prompts
from engine.frontend.step_thread import Call, StepThread
from engine.frontend.tools import read_tool_choice, read_tools
from engine.loading.resolve import resolve_model
from engine.process import RestartLimit
from engine.tokenizer.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

Message = dict[str, Any]
ParamsOfPrompts = SamplingParams | Iterable[SamplingParams] | None
"""One for all prompts, or one for each; None: the model's own defaults."""


class LLM:
    """A model, loaded and ready to generate.

    Args:
        model: Alias, directory, .gguf file or Hugging Face repository id.
        options: Every option of `EngineConfig`.

    With several ranks it has processes, which go when it is closed, collected, or when the program ends.

    Raises:
        ConfigError, ModelNotFoundError, CheckpointError: Says which option, and what would work.
    """

    _process_id: ClassVar[int | None] = None

    def __init__(self, model: str = "llama", **options: Any) -> None:
        self._check_process()
        self.config = EngineConfig.from_options(model=model, **options)
        with caching_in(self.config.cache_dir):
            path = resolve_model(self.config.model)
            self.tokenizer = load_tokenizer(path, may_stand_in=self.config.load_format == "dummy")
        core = _start(self.config, path, self.tokenizer.eos_token_ids)
        # The next engine's options: nothing here keeps the first one.
        pinned, ends = core.info.pinned(self.config), self.tokenizer.eos_token_ids
        self._steps = StepThread(
            core,
            lambda: _start(pinned, path, ends),
            RestartLimit(self.config.max_restarts, self.config.restart_window),
        )
        print(core.info.memory_plan, file=sys.stderr)
        self._forms = FormChecker(self.tokenizer, self.core.info.vocab_size)
        self._request_ids = map(str, count())

    @property
    def core(self) -> EngineCore[Any]:
        """The engine, another one after the loss of a rank."""
        return self._steps.core

    def close(self) -> None:
        """Ends the processes of other ranks. May be called twice; with them nothing can be generated afterwards."""
        self._steps.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @classmethod
    def _check_process(cls) -> None:
        """Refuses a process that was forked from one with an LLM: its threads, and their locks, were left there.

        Raises:
            ConfigError: It is one.
        """
        if cls._process_id not in (None, os.getpid()):
            raise ConfigError(
                "an LLM cannot run in a process forked from one that has used an LLM: its threads are not there; "
                'start it with multiprocessing.get_context("spawn")'
            )
        cls._process_id = os.getpid()

    def _is_clipped(self, request: Request) -> bool:
        room = self.core.info.max_model_len - len(request.prompt_token_ids)
        return request.params.max_tokens is not None and request.params.max_tokens > room

    @property
    def default_params(self) -> SamplingParams:
        """The sampling parameters that the model's generation_config.json recommends."""
        return SamplingParams(**self.core.info.default_params)

    def generate(
        self,
        prompts: Any,
        params: ParamsOfPrompts = None,
        *,
        sampling_params: ParamsOfPrompts = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generates for one prompt or several, text or token ids, and returns results in their order.

        Calls of several threads share steps, each with its own results. One that is interrupted takes its requests
        with it.

        Args:
            prompts: As `engine.frontend.prompts.read_prompts` takes them: text, token ids, or many of either. A
                max_tokens that does not fit beside a prompt is lowered, with one warning.
            params: One for all, or one a prompt; None for the model's own defaults.
            sampling_params: Another name of `params`, which vLLM has for them.
            use_tqdm: Show a progress bar with tokens/s.

        Raises:
            RequestError: A prompt or parameter that cannot be served; nothing is generated then.
        """
        self._check_process()
        prompt_list = read_prompts(prompts)
        params_list = self._params_list(_one_of(params, sampling_params), len(prompt_list))
        requests = [
            self._make_request(index, prompt, prompt_params)
            for index, (prompt, prompt_params) in enumerate(zip(prompt_list, params_list, strict=True))
        ]
        num_clipped = sum(map(self._is_clipped, requests))
        if num_clipped:
            logger.warning(
                "max_tokens of %d of %d prompts exceed what the context of %d tokens leaves: lowered to that",
                num_clipped,
                len(requests),
                self.core.info.max_model_len,
            )
        texts = [prompt if isinstance(prompt, str) else None for prompt in prompt_list]
        return self._run(requests, texts, use_tqdm)

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        params: ParamsOfPrompts = None,
        *,
        sampling_params: ParamsOfPrompts = None,
        tools: Sequence[dict[str, Any]] = (),
        tool_choice: str | dict[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        use_tqdm: bool = True,
        **template_arguments: Any,
    ) -> list[RequestOutput]:
        """Generates the next message of one conversation or a list of them, through the chat template.

        Args:
            messages: [{"role": …, "content": …}, …], or a list of such lists; as OpenAI's, calls and results, too.
            params, sampling_params: As `generate` takes them.
            tools: What the model may call, as OpenAI's chats have them.
            tool_choice: "auto", which is the default, "none", "required", or a tool by name.
            parallel_tool_calls: Whether there may be several calls in an answer.
            template_arguments: Passed to the model's chat template.

        Returns:
            Outputs whose `text` is all that the model wrote, and whose `answer` is what it says.

        Raises:
            RequestError: As `generate`; or the template does not take messages or tools.
        """
        is_one = bool(messages) and isinstance(messages[0], dict)
        conversations: list[Any] = [messages] if is_one else list(messages)
        read = read_tools(tools)
        choice = read_tool_choice(tool_choice, read)
        params_list = self._params_list(_one_of(params, sampling_params), len(conversations))
        turns = [
            self._chat_format.turn(
                conversation, read, choice, parallel_tool_calls, one.structured_outputs, **template_arguments
            )
            for conversation, one in zip(conversations, params_list, strict=True)
        ]
        params_list = [turn.params(one) for turn, one in zip(turns, params_list, strict=True)]
        results = self.generate([turn.prompt_token_ids for turn in turns], params_list, use_tqdm=use_tqdm)
        for turn, result in zip(turns, results, strict=True):
            for output in result.outputs:
                output.answer = turn.read(output.text)
        return results

    def embed(
        self,
        prompts: Any,
        pooling: Pooling = "last",
        *,
        dimensions: int | None = None,
        normalize: bool = True,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """The embeddings of one prompt or several, in their order; see `PoolingParams` for the arguments.

        Args:
            prompts: As `generate` takes them.

        Raises:
            RequestError: A prompt or argument that cannot be served; nothing is computed then.
        """
        self._check_process()
        params = PoolingParams(pooling=pooling, dimensions=dimensions, normalize=normalize)
        info = self.core.info
        processors: dict[str, EmbeddingProcessor] = {}
        for prompt in read_prompts(prompts):
            token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            validate_embedding(
                token_ids, params, info.max_model_len, info.vocab_size, info.hidden_size, "prompt"
            )
            request = embedding_request(next(self._request_ids), token_ids, params)
            text = prompt if isinstance(prompt, str) else None
            processors[request.request_id] = EmbeddingProcessor(request, text, params)
        results: dict[str, EmbeddingRequestOutput] = {}
        requests = [processor.request for processor in processors.values()]

        def take(output: EmbeddingRequestOutput) -> None:
            results[output.request_id] = output

        # One that is started again computes them anew.
        self._finish(Call(requests, processors, take, lambda _: []), "Embedding", use_tqdm)
        return [results[request.request_id] for request in requests]

    def score(self, prompts: Any, continuations: Any, *, use_tqdm: bool = True) -> list[Score]:
        """How likely the model holds each continuation of its prompt: ln P(continuation | prompt).

        This is not vLLM's `score`, which compares texts with a model made for that. A continuation's tokens are those
        of prompt and continuation as one text, from the first that is not the prompt's own; if either is given as
        token ids, those of the continuation, made without special tokens, follow the prompt's.

        Args:
            prompts: As `generate` takes them: one for each continuation, or one for all.
            continuations: Likewise: one for each prompt, or one for all.

        Raises:
            RequestError: A continuation adds no token, or the numbers of both differ.
            EngineError: The model's numbers are not finite.
        """
        prompt_list, continuation_list = read_prompts(prompts), read_prompts(continuations)
        count = max(len(prompt_list), len(continuation_list))
        if count == 0:
            return []
        if {len(prompt_list), len(continuation_list)} - {1, count}:
            raise RequestError(
                f"{len(prompt_list)} prompts and {len(continuation_list)} continuations: "
                "give as many of both, or one of either"
            )
        pairs = zip(
            prompt_list * (count // len(prompt_list)),
            continuation_list * (count // len(continuation_list)),
            strict=True,
        )
        texts = [self._continued(*pair) for pair in pairs]
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        results = self.generate([token_ids for token_ids, _ in texts], params, use_tqdm=use_tqdm)
        return [_score_of(result, start) for result, (_, start) in zip(results, texts, strict=True)]

    def _continued(self, prompt: Prompt, continuation: Prompt) -> tuple[list[int], int]:
        """The tokens of both, and how many of them are the prompt's."""
        encode = self.tokenizer.encode
        before = encode(prompt) if isinstance(prompt, str) else prompt
        if isinstance(prompt, str) and isinstance(continuation, str):
            whole = encode(prompt + continuation)
            differing = (i for i, pair in enumerate(zip(before, whole, strict=False)) if pair[0] != pair[1])
            start = next(differing, min(len(before), len(whole)))
        else:
            added = encode(continuation, False) if isinstance(continuation, str) else continuation
            whole, start = before + added, len(before)
        if start == 0:
            raise RequestError(
                "prompts: the first token of all has no log-probability: none may be empty", "prompt"
            )
        if start == len(whole):
            raise RequestError(f"continuations: {continuation!r} adds no token to its prompt", "prompt")
        return whole, start

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer, with `encode`, `decode` and `apply_chat_template`."""
        return self.tokenizer

    @cached_property
    def _chat_format(self) -> ChatFormat:
        return ChatFormat(self.tokenizer, self.config.tool_format, self.config.reasoning_format)

    def _params_list(self, params: ParamsOfPrompts, num_prompts: int) -> list[SamplingParams]:
        """The parameters of each prompt.

        Raises:
            RequestError: They are none, or of another number.
        """
        if params is None:
            params = self.default_params
        params_list = [params] * num_prompts if isinstance(params, SamplingParams) else list(params)
        wrong = next((one for one in params_list if not isinstance(one, SamplingParams)), None)
        if wrong is not None:
            raise RequestError(f"params: expected SamplingParams, found {wrong!r}")
        if len(params_list) != num_prompts:
            raise RequestError(f"{len(params_list)} params for {num_prompts} prompts: give one, or one each")
        return params_list

    def _make_request(self, index: int, prompt: Prompt, params: SamplingParams) -> Request:
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        info = self.core.info
        bad_words = self.tokenizer.encode_bad_words(params.bad_words)
        validate_request(
            token_ids,
            params,
            info.max_model_len,
            info.vocab_size,
            self.tokenizer.eos_token_ids,
            clips_max_tokens=True,
            bad_words=bad_words,
        )
        if params.structured_outputs is not None:
            self._forms.check(params.structured_outputs)
            if self.core.grammars.vocabulary is None:
                self.core.grammars.vocabulary = self.tokenizer.vocabulary()
        return Request(
            request_id=next(self._request_ids),
            prompt_token_ids=token_ids,
            params=params,
            seed=request_seed(params.seed, self.config.seed, iter([index])),
            bad_words=bad_words,
        )

    def _run(self, requests: list[Request], prompts: list[str | None], use_tqdm: bool) -> list[RequestOutput]:
        processors = {}
        results = {}
        for request, prompt in zip(requests, prompts, strict=True):
            processors[request.request_id] = OutputProcessor(request, prompt, self.tokenizer)
            results[request.request_id] = _empty_result(request, prompt)
        call = Call(
            requests,
            processors,
            lambda addition: _extend_result(results[addition.request_id], addition),
            lambda request_id: _resumed(results[request_id]),
        )
        self._finish(call, "Generating", use_tqdm)
        return list(results.values())

    def _finish(self, call: Call, description: str, use_tqdm: bool) -> None:
        """Runs steps until all requests of a call have finished."""
        if not call.requests:
            return
        with tqdm(
            total=len(call.requests), desc=description, unit="prompt", disable=not use_tqdm
        ) as progress:

            def show(call: Call) -> None:
                elapsed = progress.format_dict["elapsed"]
                if call.num_tokens:
                    progress.set_postfix_str(
                        f"{call.num_tokens / max(elapsed, 1e-9):.1f} tokens/s", refresh=False
                    )
                progress.update(call.num_finished - progress.n)

            self._steps.run(call, show)


def _start(config: EngineConfig, path: Path, eos_token_ids: Collection[int]) -> EngineCore[Any]:
    core = start_engine(config, path, eos_token_ids)
    # Nobody waits for the next token here: prompts get on as fast as they can.
    core.scheduler.config = replace(core.scheduler.config, max_step_slowdown=None)
    return core


def _one_of(params: ParamsOfPrompts, sampling_params: ParamsOfPrompts) -> ParamsOfPrompts:
    """What is given of two names of one argument.

    Raises:
        RequestError: Both are.
    """
    if params is not None and sampling_params is not None:
        raise RequestError("params and sampling_params are two names of one argument: give one of them")
    return params if sampling_params is None else sampling_params


def _score_of(result: RequestOutput, start: int) -> Score:
    """The score of a prompt's tokens from `start` on.

    Raises:
        EngineError: They could not be computed.
    """
    if result.error is not None:
        raise EngineError(f"score: {result.error}")
    assert result.prompt_logprobs is not None
    token_ids = result.prompt_token_ids[start:]
    # The first entry of each is the prompt's own token.
    found = [next(iter(entries.values())) for entries in result.prompt_logprobs[start:] if entries]
    logprobs = [entry.logprob for entry in found]
    return Score(token_ids, logprobs, sum(logprobs), all(entry.rank == 1 for entry in found))


def _empty_result(request: Request, prompt: str | None) -> RequestOutput:
    outputs = [CompletionOutput(index) for index in range(request.params.n)]
    if request.params.logprobs is not None:
        outputs = [replace(output, logprobs=[], cumulative_logprob=0.0) for output in outputs]
    return RequestOutput(request.request_id, prompt, request.prompt_token_ids, outputs)


def _resumed(result: RequestOutput) -> list[list[int] | None]:
    return [None if output.finish_reason else list(output.token_ids) for output in result.outputs]


def _extend_result(result: RequestOutput, addition: RequestOutput) -> None:
    for new in addition.outputs:
        output = result.outputs[new.index]
        output.text += new.text
        output.token_ids += new.token_ids
        if output.logprobs is not None:
            output.logprobs += new.logprobs or []
        if output.cumulative_logprob is not None:
            output.cumulative_logprob += new.cumulative_logprob or 0.0
        output.finish_reason, output.stop_reason = new.finish_reason, new.stop_reason
        if new.index == 0:
            result.num_cached_tokens = addition.num_cached_tokens
    if addition.prompt_logprobs is not None:
        result.prompt_logprobs = addition.prompt_logprobs
    result.finished = addition.finished
    result.error = addition.error
