"""python -m engine.serve: the OpenAI-compatible server, with the options of EngineConfig and a few more."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from engine import logs
from engine.arguments import build_parser
from engine.config import EngineConfig, option_types, parse_bytes
from engine.errors import EngineError
from engine.installation import check_api, missing_package

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the options and serves until interrupted. Returns the exit status."""
    options = build_parser().parse_args(arguments)
    log_format = options.log_format or os.environ.get("ENGINE_LOG_FORMAT") or "text"
    try:
        logs.configure(log_format)
        # For the engine's processes.
        os.environ["ENGINE_LOG_FORMAT"] = log_format
        _serve(EngineConfig(**{name: getattr(options, name) for name in option_types()}), options)
    except KeyboardInterrupt:
        return 130
    except EngineError as error:
        logger.error("%s: %s", type(error).__name__, error)
        return 1
    return 0


def _serve(config: EngineConfig, options: argparse.Namespace) -> None:
    body_size = options.max_body_size
    # Of `api.serve`, which is not imported yet.
    arguments: dict[str, Any] = {
        "served_model_names": options.served_model_name or [options.model],
        "api_key": options.api_key or os.environ.get("ENGINE_API_KEY"),
        "open_metrics": options.open_metrics,
        "cors_origins": options.cors_origins,
        "drain_seconds": options.drain_timeout,
        "send_seconds": options.send_timeout,
        "max_body_bytes": None if body_size is None else parse_bytes(body_size, "max_body_size"),
        "response_store_bytes": parse_bytes(options.response_store_memory, "response_store_memory"),
        "response_store_seconds": 3600 * options.response_store_hours,
    }
    check_api()
    try:
        import uvloop

        from engine.frontend.child import launch
    except ModuleNotFoundError as error:
        raise missing_package(error, "serve") from error

    # Until the engine is ready: what a start makes stays, and looking through it for garbage takes long.
    gc.disable()

    async def run() -> None:
        # The engine's process loads torch while this one loads the server.
        child = await launch()
        try:
            try:
                from api import QueueLimits, read_keys, serve
                from engine.router.restarting import RestartingEngine
            except ModuleNotFoundError as error:
                raise missing_package(error, "serve") from error
            limits = QueueLimits(
                max_queued_requests=options.max_queued_requests,
                max_queued_tokens=options.max_queued_tokens,
                slo_ttft_ms=options.slo_ttft_ms,
                queue_timeout=options.queue_timeout,
            )
            keys = [] if options.api_keys is None else read_keys(options.api_keys)
            engine = RestartingEngine(config, child=child)
            await serve(engine, options.host, options.port, limits=limits, api_keys=keys, **arguments)
        finally:
            await child.end()

    uvloop.run(run())


if __name__ == "__main__":
    sys.exit(main())
