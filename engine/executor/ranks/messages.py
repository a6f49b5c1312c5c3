"""What the ranks of an engine say to each other besides tensors: msgpack over zmq."""

from __future__ import annotations

from typing import Any

import msgspec

from engine.core.batch import Batch, Draw
from engine.core.request import (
    PooledState,
    PromptLogprobs,
    RowFailure,
    RowResult,
    SampledToken,
    ScoredPrompt,
)
from engine.executor.ranks.agreement import Standing


class RankStart(msgspec.Struct, tag=True, kw_only=True):
    """The first message to a rank: what it is to be.

    Attributes:
        options: The fields of EngineConfig.
        path: Directory or file of the model.
        store: A file where the ranks' groups meet.
    """

    options: dict[str, Any]
    path: str
    rank: int
    store: str


class Execute(msgspec.Struct, tag=True):
    """Run the model over a batch."""

    step: int
    batch: Batch


class Sample(msgspec.Struct, tag=True):
    """Draw the tokens of the batch that was executed last."""

    step: int
    draws: list[Draw | None]


ToRank = RankStart | Execute | Sample


class RankHere(msgspec.Struct, tag=True):
    """A rank is about to join the groups."""

    rank: int


class RankSays(msgspec.Struct, tag=True):
    """What a rank has measured of itself, for the log of rank 0.

    Attributes:
        line: It names the rank.
    """

    rank: int
    line: str


class RankReady(msgspec.Struct, tag=True):
    """A rank has loaded its share."""

    rank: int


class RankFailed(msgspec.Struct, tag=True):
    """A rank cannot start, or cannot go on.

    Attributes:
        kind: Name of the exception's class.
        message: What, where, and what to do.
    """

    rank: int
    step: int
    kind: str
    message: str


class Beat(msgspec.Struct, tag=True):
    """A rank lives, and where it stands."""

    rank: int
    standing: Standing


class Brought(msgspec.Struct, array_like=True):
    """What came of a row of a step, as it travels: a `RowResult` with a place for each of its kinds."""

    token: SampledToken | None = None
    prompt_logprobs: PromptLogprobs | None = None
    state: bytes | None = None
    failure: str | None = None

    @classmethod
    def of(cls, result: RowResult) -> Brought:
        """For the way there."""
        match result:
            case ScoredPrompt(logprobs, token):
                return cls(token, logprobs)
            case PooledState(values):
                return cls(state=values)
            case RowFailure(message):
                return cls(failure=message)
        return cls(result)

    def result(self) -> RowResult:
        """What `of` was given."""
        if self.failure is not None:
            return RowFailure(self.failure)
        if self.state is not None:
            return PooledState(self.state)
        return self.token if self.prompt_logprobs is None else ScoredPrompt(self.prompt_logprobs, self.token)


class Done(msgspec.Struct, tag=True):
    """A rank is through with a step.

    Attributes:
        digest: Of the batch and, on the last stage, of what came of it; the same on all ranks of a stage.
        results: What came of its rows, from the rank that tells rank 0 what the last stage brought.
    """

    rank: int
    step: int
    digest: bytes
    results: list[Brought] | None = None


FromRank = RankHere | RankSays | RankReady | RankFailed | Beat | Done

to_rank_decoder = msgspec.msgpack.Decoder(ToRank)
from_rank_decoder = msgspec.msgpack.Decoder(FromRank)
encode = msgspec.msgpack.encode
