"""Running the application: the port, the engine's start, and an orderly end."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import resource
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import uvicorn

from api.admission import Admission, QueueLimits
from api.app import create_app
from api.limits import KEEP_ALIVE_SECONDS
from api.slow_readers import SlowReaderProtocol, SlowReaders
from api.watchdog import watch_loop
from engine.errors import ConfigError, EngineDeadError

if TYPE_CHECKING:
    from engine.router.restarting import RestartingEngine

logger = logging.getLogger(__name__)

# Seconds to deliver the error that ends the requests which are still open when the server stops.
DELIVERY_SECONDS = 2
# How long a client may read nothing of what it was sent.
SEND_SECONDS = 60.0
# More than connections need; some systems permit a billion files, and some programs close that many.
MAX_OPEN_FILES = 2**16
# Files that the process has open beside connections, and some more.
OWN_FILES = 48
# Fewer connections than this are said.
FEW_CONNECTIONS = 512


class Server(uvicorn.Server):
    """A uvicorn server that leaves signals to `serve`."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens on `host`:`port`.

    Raises:
        ConfigError: The address is taken, forbidden, or not this machine's.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port must be between 0 and 65535, got {port}; choose another with --port")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            hint = f"port {port} on {host} is taken; stop what listens there or choose another with --port"
        elif error.errno == errno.EACCES:
            hint = f"port {port} needs privileges; choose one above 1023 with --port"
        else:
            hint = f"cannot listen on {host}:{port} ({error.strerror or error}); choose another --host"
        raise ConfigError(hint) from None


def _raise_open_files_limit() -> int:
    """Lets this process, and those it starts, open as many files as the system permits; returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def _most_connections() -> int:
    """How many connections may be open at once; a further one is answered with 503.

    Raises:
        ConfigError: None may.
    """
    limit = _raise_open_files_limit()
    most, remedy = limit - OWN_FILES, "raise the limit (ulimit -Hn, LimitNOFILE of systemd)"
    if most < 1:
        raise ConfigError(
            f"the system lets this process open {limit} files, all of which it needs itself; {remedy}"
        )
    if most < FEW_CONNECTIONS:
        logger.warning(
            "the system lets this process open %d files, enough for %d connections at once; %s",
            limit,
            most,
            remedy,
        )
    return most


async def serve(
    engine: RestartingEngine,
    host: str,
    port: int,
    *,
    served_model_names: list[str],
    drain_seconds: float = 0.0,
    send_seconds: float = SEND_SECONDS,
    limits: QueueLimits | None = None,
    **application: Any,
) -> None:
    """Serves `engine` on `host`:`port` until SIGINT or SIGTERM; starts the engine and shuts it down.

    The server answers from the first moment; until the engine is ready, with 503. Garbage is collected from then on,
    among what comes after the start. Port 0 takes a free port, which the log names. After the first signal the
    server takes no new requests, and open ones may finish; a second one ends these at once.

    Args:
        drain_seconds: How long open requests may take to finish.
        send_seconds: How long a client may read nothing of what it was sent.
        limits: How much may wait.
        application: The other arguments of `create_app`.

    Raises:
        ConfigError: The address cannot be listened on, or no connection may be open; nothing was started.
        EngineStartError: The engine did not start; the server has stopped.
        EngineDeadError: Engines have died too often; open requests have ended with an error, and the server has
            stopped.
    """
    listener = _listen(host, port)
    admission = Admission(lambda: engine.stats, limits)
    app = create_app(engine, served_model_names=served_model_names, admission=admission, **application)
    readers = SlowReaders(send_seconds, app.state.metrics.count_slow_reader)
    server = Server(
        uvicorn.Config(
            app,
            # It is called as a class would be.
            http=cast(Any, partial(SlowReaderProtocol, readers=readers)),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            # It refuses the one that reaches this number.
            limit_concurrency=_most_connections() + 1,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=DELIVERY_SECONDS,
        )
    )
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: (hurry if stop.is_set() else stop).set())
    began = time.perf_counter()
    answering = asyncio.create_task(server.serve(sockets=[listener]))
    starting = asyncio.create_task(engine.start())
    stopping = asyncio.create_task(stop.wait())
    hurrying = asyncio.create_task(hurry.wait())
    failing = asyncio.create_task(engine.failed.wait())
    watching = asyncio.create_task(watch_loop(app.state.metrics.observe_loop_lag))
    try:
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            gc.freeze()
            gc.enable()
            logger.info(
                "serving %s on http://%s:%d/v1 after %.1f s",
                ", ".join(served_model_names),
                f"[{host}]" if ":" in host else host,
                listener.getsockname()[1],
                time.perf_counter() - began,
            )
            await asyncio.wait((answering, stopping, failing), return_when=asyncio.FIRST_COMPLETED)
            if stopping.done():
                admission.is_draining = True
                await _drain(server, drain_seconds, hurrying, failing)
            if failing.done():
                raise EngineDeadError(engine.error)
    finally:
        for task in (starting, stopping, hurrying, failing):
            task.cancel()
        await asyncio.gather(starting, stopping, hurrying, failing, return_exceptions=True)
        server.should_exit = True
        # Ends the requests that are still open with an error, which the server then delivers.
        await engine.shutdown()
        await answering
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def _drain(server: Server, seconds: float, *until: asyncio.Task[Any]) -> None:
    """Waits for the requests that are open, for so long, or until one of the tasks is through.

    The port stays open for probes, and for answers to those who ask meanwhile.
    """
    requests = set(server.server_state.tasks)
    if not requests:
        return
    logger.info(
        "stopping: %d requests are open and have %g s to finish; a second signal ends them at once",
        len(requests),
        seconds,
    )
    finishing = asyncio.create_task(asyncio.wait(requests))
    await asyncio.wait((finishing, *until), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finishing.cancel()
