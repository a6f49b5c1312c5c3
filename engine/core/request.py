"""Request: what a client asked for. Sequence: one sample of it on its way through the engine."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from engine.core.bans import Bitmask, TokenSequence
from engine.core.batch import Pooling
from engine.core.grammar import Grammar
from engine.core.outputs import FinishReason
from engine.core.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request as it travels to the engine.

    Attributes:
        seed: The request's own seed, or the one it was given at arrival.
        priority: Smaller is served earlier; see `engine.core.waiting` for the order among equal ones, and for how
            long those wait that are larger.
        owner: Whose request it is: owners share what is computed evenly, as `engine.core.fair_share` counts it.
        resumed_token_ids: Of a request that another engine has begun: what it drew for each sample, None where the
            sample has ended. The tokens count as output; draws and penalties go on as if this engine had drawn them.
        pooling: What is asked for is a vector of the prompt, made in this way; None for tokens.
        bad_words: The tokens of the parameters' bad_words, as `Tokenizer.encode_bad_words` has them.
        cache_salt: Requests with another one share no cached blocks with this.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    priority: int = 0
    owner: str = ""
    resumed_token_ids: list[list[int] | None] = field(default_factory=list)
    cache_salt: str = ""
    bad_words: tuple[TokenSequence, ...] = ()
    pooling: Pooling | None = None

    @property
    def has_begun(self) -> bool:
        """Whether another engine has brought anything of it."""
        return any(token_ids is None or token_ids for token_ids in self.resumed_token_ids)

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
class PromptLogprobs:
    """Log-probabilities of N tokens of a prompt, one after the other, as numbers of 32 bits in their machine's order.

    Attributes:
        start: Index of the first of them in the prompt.
        token_ids: The prompt's own tokens.
        logprobs, ranks: [N] float32 and int32, of these.
        top_ids, top_logprobs: [N, k] int32 and float32, of the k likeliest tokens, in order.
    """

    start: int
    token_ids: list[int]
    logprobs: bytes
    ranks: bytes
    top_ids: bytes
    top_logprobs: bytes

    def unpack(self) -> list[SampledToken]:
        """The tokens, as if they had been drawn."""
        count = len(self.token_ids)
        num_top = len(self.top_ids) // (4 * count)
        logprobs, top_logprobs = (array("f", data) for data in (self.logprobs, self.top_logprobs))
        ranks, top_ids = (array("i", data) for data in (self.ranks, self.top_ids))
        tops = list(zip(top_ids, top_logprobs, strict=True))
        return [
            SampledToken(token_id, logprobs[i], ranks[i], tops[i * num_top : (i + 1) * num_top])
            for i, token_id in enumerate(self.token_ids)
        ]


@dataclass(frozen=True, slots=True)
class ScoredPrompt:
    """What came of a row that has a `engine.core.batch.Scoring`.

    Attributes:
        token: What it drew; None while its prompt goes on.
    """

    logprobs: PromptLogprobs
    token: SampledToken | None


@dataclass(frozen=True, slots=True)
class PooledState:
    """What a prompt's hidden states came to.

    Attributes:
        values: [hidden] float32, little-endian.
    """

    values: bytes


@dataclass(frozen=True, slots=True)
class RowFailure:
    """What a row of a step ended in, where it could not be computed."""

    message: str


RowResult = SampledToken | ScoredPrompt | PooledState | RowFailure | None
"""What came of a row of a step; None where its prompt is not through."""


@dataclass(slots=True, kw_only=True)
class EngineOutput:
    """What one step brought to one sequence.

    Attributes:
        index: Which of the request's n samples.
        prompt_logprobs: What is new of the prompt's log-probabilities.
        state: The prompt's vector, as `PooledState` has it, where that was asked for; the sequence ends with it.
        num_cached_tokens: Prompt tokens that came from the prefix cache.
        stop_token_id: The stop token id that ended the sequence; None for end-of-sequence.
        is_form_complete: Whether it has ended because nothing can follow in its form: its last token is text.
        error: Why the sequence failed (finish_reason "error").
    """

    request_id: str
    index: int
    tokens: list[SampledToken] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    is_form_complete: bool = False
    num_cached_tokens: int = 0
    state: bytes | None = None
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
        draw_params: The request's, without what `grammar`, `allowed` and the request's `bad_words` keep: steps go to
            every rank.
        allowed: What may ever come; None: every token.
        grammar: What keeps the form of the output, from the first admission on; None without one.
        num_computed_tokens: Tokens whose keys and values are in the cache, or will be once the steps in flight
            are through.
        num_pending_tokens: Tokens that steps in flight draw: each counts from its planning to its update.
        num_stored_tokens: Leading tokens that were found in the prefix cache: their keys and values must not
            be written again, even where the last one is recomputed for its logits.
        num_cached_tokens: Prompt tokens found in the cache when the sequence was first admitted.
        is_announced: Whether an output has said that it is computed.
        num_scored_tokens: Leading tokens of the prompt whose log-probabilities are known, or will be once the steps
            in flight are through; all where nobody asks for them. The first has none.
        block_ids: Block table.
        block_hashes: Hash chain of the full blocks of `token_ids`, as far as it was needed.
        cache_salt: Start of the hash chain.
        num_entered_blocks, num_coming_blocks: While it runs, leading blocks that it has entered in the prefix cache,
            and those that it will have when its prompt is through.
        num_served_tokens: Leading tokens that were computed, whatever was lost since; its owner was charged for those
            that no cache had.
        priority: The request's, or that of others which it was admitted before; see `engine.core.waiting`.
        slot, admission: As in `BatchRow`, while the sequence runs.
    """

    request: Request
    index: int
    arrival: int
    cache_salt: bytes
    leader: Sequence | None = None
    token_ids: list[int] = field(default_factory=list)
    draw_params: SamplingParams = field(init=False)
    allowed: Bitmask | None = None
    grammar: Grammar | None = None
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    num_stored_tokens: int = 0
    num_cached_tokens: int | None = None
    is_announced: bool = False
    num_scored_tokens: int = field(init=False)
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_entered_blocks: int = 0
    num_coming_blocks: int = 0
    num_served_tokens: int = 0
    priority: int = field(init=False)
    status: SequenceStatus = SequenceStatus.WAITING
    slot: int = 0
    admission: int = 0

    def __post_init__(self) -> None:
        self.token_ids = self.request.prompt_token_ids + (self.request.resumed(self.index) or [])
        self.priority = self.request.priority
        params = self.request.params
        if params.structured_outputs or params.allowed_token_ids is not None or params.bad_words:
            params = replace(params, structured_outputs=None, allowed_token_ids=None, bad_words=())
        self.draw_params = params
        # They are the prompt's: its first sample brings them. One that goes on elsewhere has brought them there.
        has_all = params.prompt_logprobs is None or self.leader is not None or self.request.has_begun
        self.num_scored_tokens = self.num_prompt_tokens if has_all else 1

    @property
    def owner(self) -> str:
        return self.request.owner

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
        """Who goes first among those that run: priority, then arrival."""
        return (self.priority, self.arrival)
