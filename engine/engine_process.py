"""The engine process: `python -m engine.engine_process ADDRESS`, started by AsyncEngine and by nobody else.

Lives as long as its parent: the parent holds the other end of standard input, and its end is the signal to go.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import zmq

from engine.config import EngineConfig
from engine.errors import EngineError
from engine.messages import Abort, Add, Died, Outputs, Ready, Start, StartFailed, encode, to_engine_decoder


def main(address: str) -> int:
    """Connects to the parent, loads the model, and steps until told to stop. Returns the exit status of a failure."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    # A service manager may signal every process it knows; the parent decides what that means.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.set_hwm(0)
        socket.connect(address)
        try:
            core = _load(to_engine_decoder.decode(socket.recv()))
        except Exception as error:
            if not isinstance(error, EngineError):
                traceback.print_exc()
            socket.send(encode(StartFailed(type(error).__name__, str(error))))
            return 1
        socket.send(encode(Ready(core.info)))
        try:
            _run(core, socket)
        except Exception as error:
            traceback.print_exc()
            socket.send(encode(Died(f"{type(error).__name__}: {error}")))
        return 1


def _load(message: object) -> Any:
    assert isinstance(message, Start)
    from engine.core import EngineCore

    return EngineCore(EngineConfig(**message.options), Path(message.path), message.eos_token_ids)


def _run(core: Any, socket: zmq.Socket[bytes]) -> None:
    """Takes in messages between steps; waits for one, without spinning, when there is nothing to do."""
    while True:
        while not core.has_work or socket.poll(0):
            match to_engine_decoder.decode(socket.recv()):
                case Add(request):
                    core.add_request(request)
                case Abort(request_id, index):
                    core.abort(request_id, index)
                    if not core.has_work:
                        socket.send(encode(Outputs([], core.stats)))
        outputs = core.step()
        socket.send(encode(Outputs(outputs, core.stats)))


def _exit_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
