"""LLM: offline generation in this process."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any, Self

from tqdm import tqdm

from engine.config import EngineConfig
from engine.core.outputs import CompletionOutput, RequestOutput
from engine.core.random import derive_seed
from engine.core.request import Request
from engine.core.sampling_params import SamplingParams
from engine.core.validation import validate_request
from engine.errors import RequestError
from engine.executor.start import start_engine
from engine.frontend.output_processor import OutputProcessor
from engine.loading.resolve import resolve_model
from engine.tokenizer.tokenizer import load_tokenizer

Prompt = str | list[int]
Message = dict[str, Any]


class LLM:
    """A model, loaded and ready to generate.

    Args:
        model: Alias, directory, .gguf file or Hugging Face repository id.
        options: Every option of `EngineConfig`.

    With several ranks it has processes, which go when it is closed, collected, or when the program ends.

    Raises:
        ConfigError, ModelNotFoundError, CheckpointError: Says which option, and what would work.
    """

    def __init__(self, model: str = "llama", **options: Any) -> None:
        self.config = EngineConfig.from_options(model=model, **options)
        path = resolve_model(self.config.model)
        self.tokenizer = load_tokenizer(path, may_stand_in=self.config.load_format == "dummy")
        self.core = start_engine(self.config, path, self.tokenizer.eos_token_ids)
        print(self.core.info.memory_plan, file=sys.stderr)
        self._request_ids = map(str, count())

    def close(self) -> None:
        """Ends the processes of other ranks. May be called twice; with them nothing can be generated afterwards."""
        self.core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def default_params(self) -> SamplingParams:
        """The sampling parameters that the model's generation_config.json recommends."""
        return SamplingParams(**self.core.info.default_params)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generates for one prompt or a list, text or token ids, and returns results in their order.

        Args:
            params: One for all, or one a prompt; None for the model's own defaults.
            use_tqdm: Show a progress bar with tokens/s.

        Raises:
            RequestError: A prompt or parameter that cannot be served; nothing is generated then.
        """
        prompt_list = _as_list(prompts)
        if params is None:
            params = self.default_params
        params_list = [params] * len(prompt_list) if isinstance(params, SamplingParams) else list(params)
        if len(params_list) != len(prompt_list):
            raise RequestError(
                f"{len(params_list)} params for {len(prompt_list)} prompts: give one, or one each"
            )
        requests = [
            self._make_request(index, prompt, prompt_params)
            for index, (prompt, prompt_params) in enumerate(zip(prompt_list, params_list, strict=True))
        ]
        texts = [prompt if isinstance(prompt, str) else None for prompt in prompt_list]
        return self._run(requests, texts, use_tqdm)

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **template_arguments: Any,
    ) -> list[RequestOutput]:
        """Generates the next message of one conversation or a list of them, through the chat template.

        Args:
            messages: [{"role": …, "content": …}, …], or a list of such lists.
            template_arguments: Passed to the model's chat template.
        """
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        prompts: list[Prompt] = [
            self.tokenizer.encode_chat(conversation, **template_arguments)  # type: ignore[arg-type]
            for conversation in conversations
        ]
        return self.generate(prompts, params, use_tqdm=use_tqdm)

    def _make_request(self, index: int, prompt: Prompt, params: SamplingParams) -> Request:
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        validate_request(token_ids, params, self.core.info.max_model_len, self.core.info.vocab_size)
        seed = params.seed
        if seed is None:
            seed = secrets.randbits(63) if self.config.seed is None else derive_seed(self.config.seed, index)
        return Request(
            request_id=next(self._request_ids), prompt_token_ids=token_ids, params=params, seed=seed
        )

    def _run(self, requests: list[Request], prompts: list[str | None], use_tqdm: bool) -> list[RequestOutput]:
        processors = {}
        results = {}
        for request, prompt in zip(requests, prompts, strict=True):
            processors[request.request_id] = OutputProcessor(request, prompt, self.tokenizer)
            results[request.request_id] = _empty_result(request, prompt)
            self.core.add_request(request)
        progress = tqdm(total=len(requests), desc="Generating", unit="prompt", disable=not use_tqdm)
        try:
            with progress:
                self._run_steps(processors, results, progress)
        finally:
            # After an interrupt the engine must not go on with what nobody waits for.
            for request_id in processors:
                self.core.abort(request_id)
        return list(results.values())

    def _run_steps(
        self,
        processors: dict[str, OutputProcessor],
        results: dict[str, RequestOutput],
        progress: tqdm[Any],
    ) -> None:
        num_tokens = 0
        while self.core.has_work:
            for output in self.core.step():
                processor = processors[output.request_id]
                addition = processor.process(output)
                for index in processor.stopped_samples:
                    self.core.abort(output.request_id, index)
                processor.stopped_samples.clear()
                if addition is None:
                    continue
                _extend_result(results[output.request_id], addition)
                num_tokens += len(output.tokens)
                if addition.finished:
                    progress.update()
            elapsed = progress.format_dict["elapsed"]
            progress.set_postfix_str(f"{num_tokens / max(elapsed, 1e-9):.1f} tokens/s", refresh=False)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _empty_result(request: Request, prompt: str | None) -> RequestOutput:
    outputs = [CompletionOutput(index) for index in range(request.params.n)]
    if request.params.logprobs is not None:
        outputs = [replace(output, logprobs=[]) for output in outputs]
    return RequestOutput(request.request_id, prompt, request.prompt_token_ids, outputs)


def _extend_result(result: RequestOutput, addition: RequestOutput) -> None:
    for new in addition.outputs:
        output = result.outputs[new.index]
        output.text += new.text
        output.token_ids += new.token_ids
        if output.logprobs is not None:
            output.logprobs += new.logprobs or []
        output.finish_reason, output.stop_reason = new.finish_reason, new.stop_reason
        if new.index == 0:
            result.num_cached_tokens = addition.num_cached_tokens
    result.finished = addition.finished
    result.error = addition.error
