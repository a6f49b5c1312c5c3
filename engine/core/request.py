"""Request: what a client asked for. Sequence: one sample of it on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum, auto

from engine.core.grammar import Grammar
from engine.core.outputs import FinishReason
from engine.core.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request as it travels to the engine.

    Attributes:
        seed: The request's own seed, or the one it was given at arrival.
        priority: Smaller is served earlier; equal priorities in order of arrival.
        resumed_token_ids: Of a request that another engine has begun: what it drew for each sample, None where the
            sample has ended. The tokens count as output; draws and penalties go on as if this engine had drawn them.
        cache_salt: Requests with another one share no cached blocks with this.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    priority: int = 0
    resumed_token_ids: list[list[int] | None] = field(default_factory=list)
    cache_salt: str = ""

    def resumed(self, index: int) -> list[int] | None:
        """What sample `index` begins with; None if it has ended."""
        return self.resumed_token_ids[index] if self.resumed_token_ids else []


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One drawn token.

    Attributes:
        logprob: The log-probability of the token and its rank, if asked for.
        top_logprobs: (token id, log-probability) of the likeliest tokens, in order.
    """

    token_id: int
    logprob: float | None = None
    rank: int = 0
    top_logprobs: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RowFailure:
    """What a row of a step ended in, where it could not be computed."""

    message: str


@dataclass(slots=True, kw_only=True)
class EngineOutput:
    """What one step brought to one sequence.

    Attributes:
        index: Which of the request's n samples.
        num_cached_tokens: Prompt tokens that came from the prefix cache.
        stop_token_id: The stop token id that ended the sequence; None for end-of-sequence.
        is_form_complete: Whether it has ended because nothing can follow in its form: its last token is text.
        error: Why the sequence failed (finish_reason "error").
    """

    request_id: str
    index: int
    tokens: list[SampledToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    is_form_complete: bool = False
    num_cached_tokens: int = 0
    error: str | None = None


class SequenceStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample of a request.

    `num_computed_tokens` chases `num_tokens`: a prompt, a chunk of one, a decode and the recomputation after
    a preemption are all the same chase.

    Attributes:
        arrival: Order of arrival in the engine, unique.
        leader: The request's first sample, whose blocks this one waits for; None for the first itself.
        token_ids: Prompt and output.
        draw_params: The request's, without the form, which `grammar` keeps: steps go to every rank.
        grammar: What keeps the form of the output, from the first admission on; None without one.
        num_computed_tokens: Tokens whose keys and values are in the cache, or will be once the steps in flight
            are through.
        num_pending_tokens: Tokens that steps in flight draw: each counts from its planning to its update.
        num_stored_tokens: Leading tokens that were found in the prefix cache: their keys and values must not
            be written again, even where the last one is recomputed for its logits.
        num_cached_tokens: Prompt tokens found in the cache when the sequence was first admitted.
        block_ids: Block table.
        block_hashes: Hash chain of the full blocks of `token_ids`, as far as it was needed.
        cache_salt: Start of the hash chain.
        slot, admission: As in `BatchRow`, while the sequence runs.
    """

    request: Request
    index: int
    arrival: int
    cache_salt: bytes
    leader: Sequence | None = None
    token_ids: list[int] = field(default_factory=list)
    draw_params: SamplingParams = field(init=False)
    grammar: Grammar | None = None
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    num_stored_tokens: int = 0
    num_cached_tokens: int | None = None
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    status: SequenceStatus = SequenceStatus.WAITING
    slot: int = 0
    admission: int = 0

    def __post_init__(self) -> None:
        self.token_ids = self.request.prompt_token_ids + (self.request.resumed(self.index) or [])
        params = self.request.params
        self.draw_params = replace(params, structured_outputs=None) if params.structured_outputs else params

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens not yet computed, the pending one among them; 1 for a sequence that decodes."""
        return len(self.token_ids) + self.num_pending_tokens - self.num_computed_tokens

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: priority, then arrival."""
        return (self.request.priority, self.arrival)
