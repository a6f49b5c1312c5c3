"""Options of EngineConfig as command-line options: an option for every field."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, Literal, get_args, get_origin, get_type_hints

from engine.config import EngineConfig


def build_parser() -> argparse.ArgumentParser:
    """A parser with an option for every field of EngineConfig, and the server's own."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.serve",
        description="Serve a model over an OpenAI-compatible API.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=8000, help="port; 0 takes a free one (default: %(default)s)"
    )
    parser.add_argument(
        "--served-model-name", nargs="+", help="names of the model in the API; default: --model"
    )
    parser.add_argument("--api-key", help="key that requests must carry; default: $ENGINE_API_KEY, if set")
    add_engine_options(parser)
    return parser


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Gives the parser an option for every field of EngineConfig."""
    hints = get_type_hints(EngineConfig)
    for option in dataclasses.fields(EngineConfig):
        # An option without a default of its own says in its help what stands in for it.
        shown = "" if option.default is None else " (default: %(default)s)"
        parser.add_argument(
            "--" + option.name.replace("_", "-"),
            default=option.default,
            help=option.metadata["help"] + shown,
            **_argument_type(hints[option.name]),
        )


def _argument_type(hint: Any) -> dict[str, Any]:
    """argparse's keywords for an option's type."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    plain = [kind for kind in get_args(hint) if kind is not type(None)] or [hint]
    return {"type": plain[0]}
