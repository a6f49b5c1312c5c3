"""Batch: the plan of one step, in plain Python values, as the scheduler hands it to the runner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.core.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Draw:
    """How the next token of a sequence is drawn.

    What depends on the tokens before it is filled in by `Scheduler.draws`: when the forward pass is launched,
    the last of them may not be known yet.

    Attributes:
        seed, index, position: The draw is a function of these three and the token's logits alone.
        banned_token_ids: Tokens that may not be drawn now (min_tokens, bad_words); empty otherwise.
        prompt_token_ids, output_token_ids: The sequence so far, where penalties need it; empty otherwise.
        allowed_tokens: A bitmask of what allowed_token_ids and the form of the output allow, words of 32 bits: token
            t may be drawn where bit t % 32 of word t // 32 is set; None: every token may.
    """

    params: SamplingParams
    seed: int
    index: int
    position: int
    banned_token_ids: tuple[int, ...] = ()
    prompt_token_ids: tuple[int, ...] = ()
    output_token_ids: tuple[int, ...] = ()
    allowed_tokens: bytes | None = None


Pooling = Literal["last", "mean"]
"""What makes one vector of a prompt: the state of its last token, or the mean over all."""


@dataclass(frozen=True, slots=True)
class Pool:
    """What becomes of a row's hidden states, where a prompt's vector is asked for.

    Attributes:
        is_complete: Whether the row ends the prompt, and the vector comes of it.
    """

    pooling: Pooling
    is_complete: bool


@dataclass(frozen=True, slots=True)
class Scoring:
    """Tokens of a prompt whose log-probabilities the logits of a chunk give.

    Attributes:
        start: Index of the first of them in the prompt.
        first: Index, in the chunk, of the token before it.
        token_ids: They, one after the other.
        num_top: How many of the likeliest tokens are wanted beside each.
    """

    start: int
    first: int
    token_ids: list[int]
    num_top: int


PENDING = -1
"""Stands for a token that the step before has drawn and nobody has read yet: the runner has it."""


@dataclass(frozen=True, slots=True)
class BatchRow:
    """The part of one sequence that runs in a step.

    Attributes:
        token_ids: The chunk: one token when decoding, perhaps PENDING.
        start: Position of the first of them.
        num_stored_tokens: Positions below this are in the cache already and are not written again.
        block_table: Ids of the sequence's blocks, enough for every position of the chunk.
        draw: How to draw the next token; None while the prompt goes on in a later step, and where none is asked for.
        pool: What its hidden states are for; None: nothing but the next token.
        slot: The sequence's place among the running ones, 0 … max_num_seqs - 1, its own while it runs.
        admission: Unique for each time that a sequence starts to run; its block table only grows meanwhile.
        scoring: Of what the prompt's log-probabilities are asked for; None: of nothing.
    """

    token_ids: list[int]
    start: int
    num_stored_tokens: int
    block_table: list[int]
    draw: Draw | None
    slot: int = 0
    admission: int = 0
    pool: Pool | None = None
    scoring: Scoring | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: the rows run together, and what is computed of one does not depend on the others."""

    rows: list[BatchRow]

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)

    @property
    def pools(self) -> bool:
        """Whether a row is for a vector."""
        return any(row.pool is not None for row in self.rows)

    @property
    def num_scored_tokens(self) -> int:
        """Tokens of prompts whose log-probabilities are asked for."""
        return sum(len(row.scoring.token_ids) for row in self.rows if row.scoring is not None)
