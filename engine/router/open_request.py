"""What is kept of an open request, so that another engine can go on with it where one has died.

A draw is a function of seed, sample and position alone, so that where rows do not depend on their company (int8) the
tokens are those that the first engine would have drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from engine.core.outputs import CompletionOutput, RequestOutput
from engine.core.random import request_seed
from engine.core.sampling_params import SamplingParams


def seeded(params: SamplingParams, engine_seed: int | None, arrivals: Iterator[int]) -> SamplingParams:
    """The parameters with the seed that the request has, drawn for one that has none: it must outlive the engine.

    Args:
        engine_seed: The seed from which requests get theirs; None: random.
        arrivals: Counts requests.
    """
    if params.seed is not None:
        return params
    return replace(params, seed=request_seed(None, engine_seed, arrivals))


@dataclass(slots=True, eq=False)
class OpenRequest:
    """A request that runs, and what its client has of it.

    Attributes:
        params: With the seed that the request has.
        prompt: Its text, or None if it came as token ids.
        sent: The tokens of each sample that the client has; None of one that has ended.
        num_cached_tokens: As the first engine found them: what another finds is partly the request's own.
        suspected_at: How many tokens it had when an engine died in a step with it; None if the last death was not so.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    owner: str = ""
    prompt: str | None = None
    sent: list[list[int] | None] = field(init=False)
    num_cached_tokens: int | None = None
    suspected_at: int | None = None

    def __post_init__(self) -> None:
        self.sent = [[] for _ in range(self.params.n)]

    @property
    def resumed_token_ids(self) -> list[list[int] | None]:
        """As in `Request`."""
        return [None if tokens is None else list(tokens) for tokens in self.sent]

    @property
    def num_tokens(self) -> int:
        """Prompt and output, which an engine that goes on with it computes again."""
        return len(self.prompt_token_ids) + self._num_sent

    @property
    def has_begun(self) -> bool:
        return self.num_cached_tokens is not None

    @property
    def is_finished(self) -> bool:
        return self.sent.count(None) == len(self.sent)

    @property
    def _num_sent(self) -> int:
        return sum(len(tokens) for tokens in self.sent if tokens is not None)

    def take(self, output: RequestOutput) -> RequestOutput:
        """Notes what an engine has said, and returns it changed to what the client is to see."""
        output.request_id = self.request_id
        output.prompt, output.prompt_token_ids = self.prompt, self.prompt_token_ids
        if not output.outputs and output.error is None:
            return output
        for sample in output.outputs:
            tokens = self.sent[sample.index]
            assert tokens is not None, "a sample that has ended goes on"
            tokens += sample.token_ids
            if sample.finish_reason is not None:
                self.sent[sample.index] = None
        if output.error is not None:
            self.sent = [None] * self.params.n
        if self.num_cached_tokens is None:
            self.num_cached_tokens = output.num_cached_tokens
        output.num_cached_tokens = self.num_cached_tokens
        output.finished = self.is_finished
        return output

    def blame(self, was_under_way: bool) -> bool:
        """Whether an engine has died in a step with it now, and before, with no token of its own between the two.

        Args:
            was_under_way: Whether the step amid which the engine has died was of this request.
        """
        num_sent = self._num_sent
        is_guilty = was_under_way and self.suspected_at == num_sent
        self.suspected_at = num_sent if was_under_way else None
        return is_guilty

    def failure(self, message: str) -> RequestOutput:
        """The last output of a request that cannot go on."""
        return self.take(
            RequestOutput(
                self.request_id,
                None,
                self.prompt_token_ids,
                [
                    CompletionOutput(index, finish_reason="error")
                    for index, tokens in enumerate(self.sent)
                    if tokens is not None
                ],
                error=message,
            )
        )
