"""A process that speaks as an engine's does and computes nothing: every open request gets a token a step.

`benchmarks.api` starts it behind the server, whose processor time is then all that there is to measure. An answer is
its prompt once more.
"""

from __future__ import annotations

import sys
import threading
import time

import zmq

from engine.core.outputs import FinishReason
from engine.core.request import EngineOutput, Request, SampledToken
from engine.core.stats import EngineInfo, EngineStats
from engine.executor.ranks.limits import BEAT_SECONDS
from engine.frontend.messages import Abort, Add, Alive, Outputs, Ready, encode, to_engine_decoder
from engine.process import follow_parent

STEP_SECONDS = 0.02
"""The time of a step, so that streams advance together, as they do behind a real engine."""

INFO = EngineInfo(
    max_model_len=4096,
    vocab_size=49152,
    hidden_size=1,
    max_num_seqs=256,
    default_params={},
    memory_plan="",
    num_cache_bytes=0,
    identity="tokens",
)


def main(address: str, beats: str) -> None:
    """Answers until its parent closes its standard input."""
    follow_parent()
    threading.Thread(target=_beat, args=(beats,), daemon=True).start()
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.set_hwm(0)
        socket.connect(address)
        # What to be, and which tokens end a sequence: it is always the same, and none does.
        for _ in range(2):
            to_engine_decoder.decode(socket.recv())
        socket.send(encode(Ready(INFO, EngineStats())))
        requests: dict[str, tuple[Request, int]] = {}
        while True:
            while socket.poll(0 if requests else None):
                match to_engine_decoder.decode(socket.recv()):
                    case Add(request):
                        requests[request.request_id] = request, 0
                    case Abort(request_id):
                        requests.pop(request_id, None)
            outputs = []
            for request_id, (request, num_tokens) in list(requests.items()):
                token = SampledToken(request.prompt_token_ids[num_tokens % len(request.prompt_token_ids)])
                is_last = num_tokens + 1 == request.params.max_tokens
                reason: FinishReason | None = "length" if is_last else None
                outputs.append(
                    EngineOutput(request_id=request_id, index=0, tokens=[token], finish_reason=reason)
                )
                requests[request_id] = request, num_tokens + 1
                if is_last:
                    del requests[request_id]
            socket.send(encode(Outputs(outputs, EngineStats())))
            time.sleep(STEP_SECONDS)


def _beat(address: str) -> None:
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.connect(address)
        while True:
            socket.send(encode(Alive()))
            time.sleep(BEAT_SECONDS)


if __name__ == "__main__":
    main(*sys.argv[1:])
