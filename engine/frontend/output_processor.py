"""From drawn tokens to text: incremental detokenization, stop strings, log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.core.outputs import CompletionOutput, Logprob, RequestOutput
from engine.core.request import EngineOutput, Request, SampledToken
from engine.tokenizer.tokenizer import IncrementalDetokenizer, Tokenizer


@dataclass(slots=True)
class _Sample:
    """Attributes:
    held_back: Text that may turn out to be the start of a stop string.
    num_tokens: Tokens generated so far.
    """

    detokenizer: IncrementalDetokenizer
    held_back: str = ""
    num_tokens: int = 0
    is_finished: bool = False


@dataclass(slots=True)
class OutputProcessor:
    """Follows one request, and says what each output of the engine adds to it.

    Attributes:
        stopped_samples: Samples that ended at a stop string, which the engine does not know: the caller
            aborts them and clears the list.
    """

    request: Request
    prompt: str | None
    tokenizer: Tokenizer
    stopped_samples: list[int] = field(default_factory=list)
    # The first token has none. They wait for the first token that is drawn.
    _prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=lambda: [None])
    _has_prompt_logprobs: bool = field(init=False)
    _samples: list[_Sample] = field(default_factory=list)

    def __post_init__(self) -> None:
        params = self.request.params
        self._has_prompt_logprobs = params.prompt_logprobs is not None and not self.request.has_begun
        for index in range(params.n):
            detokenizer = IncrementalDetokenizer(
                self.tokenizer,
                self.request.prompt_token_ids,
                params.skip_special_tokens,
                keeps_start=params.structured_outputs is not None,
            )
            resumed = self.request.resumed(index)
            sample = _Sample(detokenizer, is_finished=resumed is None)
            self._samples.append(sample)
            # What they add is known to who resumes; what they hold back is not.
            for token_id in resumed or []:
                tokens = [SampledToken(token_id, logprob=0.0)]
                output = EngineOutput(request_id=self.request.request_id, index=index, tokens=tokens)
                self._extend(sample, CompletionOutput(index), output)

    def process(self, output: EngineOutput) -> RequestOutput | None:
        """What is new since the last call: no sample as long as the prompt is being computed; None after the end of
        one."""
        sample = self._samples[output.index]
        if sample.is_finished:
            return None
        if output.prompt_logprobs is not None:
            # An engine that has been started again begins again.
            self._prompt_logprobs[output.prompt_logprobs.start :] = map(
                self._logprobs, output.prompt_logprobs.unpack()
            )
        if not output.tokens and output.finish_reason is None:
            return RequestOutput(self.request.request_id, self.prompt, self.request.prompt_token_ids, [])
        addition = CompletionOutput(output.index)
        if output.error is None:
            self._extend(sample, addition, output)
        else:
            addition.finish_reason = "error"
        sample.is_finished = addition.finish_reason is not None
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            outputs=[addition],
            finished=sample.is_finished
            and (output.error is not None or all(each.is_finished for each in self._samples)),
            num_cached_tokens=output.num_cached_tokens,
            prompt_logprobs=self._take_prompt_logprobs() if output.error is None else None,
            error=output.error,
        )

    def _take_prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """The prompt's log-probabilities, once."""
        if not self._has_prompt_logprobs:
            return None
        self._has_prompt_logprobs = False
        return self._prompt_logprobs

    def _extend(self, sample: _Sample, addition: CompletionOutput, output: EngineOutput) -> None:
        params = self.request.params
        addition.token_ids = [token.token_id for token in output.tokens]
        if params.logprobs is not None:
            addition.logprobs = [self._logprobs(token) for token in output.tokens]
            addition.cumulative_logprob = sum(token.logprob or 0.0 for token in output.tokens)
        # The token that ends a sequence is not part of its text.
        ends_in_token = output.finish_reason == "stop" and not output.is_form_complete
        ends_in_token = ends_in_token and not params.include_stop_str_in_output
        shown = addition.token_ids[:-1] if ends_in_token else addition.token_ids
        text = "".join(map(sample.detokenizer.push, shown))
        if output.finish_reason is not None:
            text += sample.detokenizer.flush()
        sample.num_tokens += len(output.tokens)
        text = sample.held_back + text
        sample.held_back = ""
        if params.stop and sample.num_tokens >= params.min_tokens:
            match = find_stop(text, params.stop)
            if match is not None:
                start, stop = match
                end = start + len(stop) if params.include_stop_str_in_output else start
                addition.text, addition.finish_reason, addition.stop_reason = text[:end], "stop", stop
                if output.finish_reason is None:
                    self.stopped_samples.append(output.index)
                return
            if output.finish_reason is None:
                length = len(text) - len_stop_prefix(text, params.stop)
                text, sample.held_back = text[:length], text[length:]
        addition.text = text
        addition.finish_reason, addition.stop_reason = output.finish_reason, output.stop_token_id

    def _logprobs(self, token: SampledToken) -> dict[int, Logprob]:
        assert token.logprob is not None
        entries = {token.token_id: (token.logprob, token.rank)}
        for rank, (token_id, logprob) in enumerate(token.top_logprobs, start=1):
            entries.setdefault(token_id, (logprob, rank))
        return {
            token_id: Logprob(
                logprob,
                rank,
                self.tokenizer.decode([token_id], skip_special_tokens=False),
                self.tokenizer.token_bytes(token_id),
            )
            for token_id, (logprob, rank) in entries.items()
        }


def find_stop(text: str, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """Where the earliest stop string begins, and which it is; of two that begin together, the longer."""
    matches = [(start, -len(stop), stop) for stop in stops if (start := text.find(stop)) >= 0]
    if not matches:
        return None
    start, _, stop = min(matches)
    return start, stop


def len_stop_prefix(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that a stop string could begin with."""
    longest = min(len(text), max(map(len, stops)) - 1)
    for length in range(longest, 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
