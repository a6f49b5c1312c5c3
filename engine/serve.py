"""python -m engine.serve: the OpenAI-compatible server, with the options of EngineConfig and a few more."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from engine import logs
from engine.arguments import build_parser
from engine.config import EngineConfig, parse_bytes
from engine.errors import EngineError
from engine.installation import check_api, missing_package

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the options and serves until interrupted. Returns the exit status."""
    options = vars(build_parser().parse_args(arguments))
    log_format = options.pop("log_format") or os.environ.get("ENGINE_LOG_FORMAT") or "text"
    host, port = options.pop("host"), options.pop("port")
    api_key = options.pop("api_key") or os.environ.get("ENGINE_API_KEY")
    names = options.pop("served_model_name") or [options["model"]]
    application = {
        "cors_origins": options.pop("cors_origins"),
        "api_key": api_key,
        "open_metrics": options.pop("open_metrics"),
    }
    keys_file = options.pop("api_keys")
    application["drain_seconds"] = options.pop("drain_timeout")
    names_of_limits = ("max_queued_requests", "max_queued_tokens", "slo_ttft_ms", "queue_timeout")
    limits = {name: options.pop(name) for name in names_of_limits}
    application["send_seconds"] = options.pop("send_timeout")
    store, hours = options.pop("response_store_memory"), options.pop("response_store_hours")
    max_body_size = options.pop("max_body_size")
    try:
        logs.configure(log_format)
        # For the engine's processes.
        os.environ["ENGINE_LOG_FORMAT"] = log_format
        application |= {
            "response_store_bytes": parse_bytes(store, "response_store_memory"),
            "response_store_seconds": 3600 * hours,
            "max_body_bytes": None if max_body_size is None else parse_bytes(max_body_size, "max_body_size"),
        }
        _serve(EngineConfig(**options), host, port, names, keys_file, limits, application)
    except KeyboardInterrupt:
        return 130
    except EngineError as error:
        logger.error("%s: %s", type(error).__name__, error)
        return 1
    return 0


def _serve(
    config: EngineConfig,
    host: str,
    port: int,
    names: list[str],
    keys_file: str | None,
    limits: dict[str, Any],
    application: dict[str, Any],
) -> None:
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
            keys = [] if keys_file is None else read_keys(keys_file)
            engine = RestartingEngine(config, child=child)
            await serve(
                engine,
                host,
                port,
                served_model_names=names,
                limits=QueueLimits(**limits),
                api_keys=keys,
                **application,
            )
        finally:
            await child.end()

    uvloop.run(run())


if __name__ == "__main__":
    sys.exit(main())
