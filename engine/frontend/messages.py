"""What the API process and the engine process say to each other: msgpack over one pair of zmq sockets."""

from __future__ import annotations

from typing import Any

import msgspec

from engine.core.matcher import Vocabulary
from engine.core.request import EngineOutput, Request
from engine.core.stats import EngineInfo, EngineStats
from engine.core.step_trace import Trace


class Start(msgspec.Struct, tag=True, kw_only=True):
    """The first message: what the engine is to be.

    Attributes:
        options: The fields of EngineConfig.
        path: Directory or file of the model.
    """

    options: dict[str, Any]
    path: str


class EndTokens(msgspec.Struct, tag=True):
    """The second message: the tokens that end a sequence.

    It comes once the tokenizer is there, which may take longer than the model.
    """

    eos_token_ids: list[int]


class Learn(msgspec.Struct, tag=True):
    """The tokenizer's vocabulary, before the first request with a form."""

    vocabulary: Vocabulary


class Add(msgspec.Struct, tag=True):
    request: Request


class Abort(msgspec.Struct, tag=True):
    """Ends a request, or one sample of it."""

    request_id: str
    index: int | None = None


class GetTrace(msgspec.Struct, tag=True):
    """Asks for the trace of the last seconds; `Traced` answers, in the order of the questions."""

    seconds: float


class Ready(msgspec.Struct, tag=True):
    """The engine takes requests."""

    info: EngineInfo
    stats: EngineStats


class StartFailed(msgspec.Struct, tag=True):
    """The engine could not start.

    Attributes:
        kind: Name of the exception's class.
        message: What, where, and what to do.
    """

    kind: str
    message: str


class Outputs(msgspec.Struct, tag=True):
    """What one step brought."""

    outputs: list[EngineOutput]
    stats: EngineStats


class Traced(msgspec.Struct, tag=True):
    """What was asked for by `GetTrace`."""

    trace: Trace


class Alive(msgspec.Struct, tag=True):
    """The engine's process lives; sent each second, on a socket of its own."""


class Died(msgspec.Struct, tag=True):
    """The engine cannot go on, and why; the process ends after this."""

    reason: str


ToEngine = Start | EndTokens | Learn | Add | Abort | GetTrace
FromEngine = Ready | StartFailed | Outputs | Traced | Died
Beat = Alive | Died

to_engine_decoder = msgspec.msgpack.Decoder(ToEngine)
beat_decoder = msgspec.msgpack.Decoder(Beat)
from_engine_decoder = msgspec.msgpack.Decoder(FromEngine)
encode = msgspec.msgpack.encode
