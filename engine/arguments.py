"""Options of EngineConfig as words: on a command line an option for every field, and name=value elsewhere."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from engine.config import EngineConfig, option_types
from engine.errors import ConfigError
from engine.logs import LogFormat

USAGE = "%(prog)s [options]"
"""What an error shows before it: the options are too many to be read there."""


def build_parser() -> argparse.ArgumentParser:
    """A parser with an option for every field of EngineConfig, and the server's own."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.serve",
        usage=USAGE,
        description="Serve a model over an OpenAI-compatible API.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=8000, help="port; 0 takes a free one (default: %(default)s)"
    )
    parser.add_argument(
        "--served-model-name",
        nargs="+",
        help="names of the model in the API, '*' for any name that a request gives; default: --model",
    )
    parser.add_argument("--api-key", help="key that requests must carry; default: $ENGINE_API_KEY, if set")
    parser.add_argument(
        "--api-keys",
        metavar="FILE",
        help="TOML file of keys that requests may carry besides --api-key, each with a name and limits of its own; "
        "default: none",
    )
    parser.add_argument(
        "--open-metrics",
        action="store_true",
        help="/metrics and /version need no key; by default they do, where there is one",
    )
    parser.add_argument(
        "--cors-origins",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="origins whose pages may ask from a browser, e.g. http://localhost:3000, or '*' for all; default: none",
    )
    parser.add_argument(
        "--log-format",
        choices=get_args(LogFormat),
        help="lines of the log as text, or as JSON, an object each; default: $ENGINE_LOG_FORMAT, or text",
    )
    parser.add_argument(
        "--response-store-memory",
        default="64MiB",
        help="size of the memory for responses that /v1/responses stores; 0 stores none (default: %(default)s)",
    )
    parser.add_argument(
        "--response-store-hours",
        type=float,
        default=24.0,
        help="hours for which a response is stored after it was made or gone on from (default: %(default)s)",
    )
    parser.add_argument(
        "--max-queued-requests",
        type=_count,
        help="most samples that wait for a place in the running batch; what comes then gets a 429 with Retry-After "
        "(default: any number)",
    )
    parser.add_argument(
        "--max-queued-tokens",
        type=_count,
        help="most tokens of prompts that wait to be computed, unless they are one request's (default: any number)",
    )
    parser.add_argument(
        "--slo-ttft-ms",
        type=_positive,
        help="milliseconds in which a request must have its first token; one that is predicted to miss them gets a "
        "429 with Retry-After (default: none)",
    )
    parser.add_argument(
        "--queue-timeout",
        type=_positive,
        help="seconds after which a request of which nothing has been computed, or an embedding, gets a 503 with "
        "Retry-After (default: none)",
    )
    parser.add_argument(
        "--send-timeout",
        type=_positive,
        default=60.0,
        help="seconds for which a client may read nothing of what it was sent before it is hung up on "
        "(default: %(default)g)",
    )
    parser.add_argument(
        "--drain-timeout",
        type=_seconds,
        default=25.0,
        help="seconds that open requests have to finish once SIGTERM or SIGINT asks the server to stop "
        "(default: %(default)g)",
    )
    parser.add_argument(
        "--max-body-size",
        help="longest body of a request, e.g. 8MiB; default: 16 bytes a token of --max-model-len, 2MiB at least",
    )
    add_engine_options(parser)
    return parser


def _count(text: str) -> int:
    """
    Raises:
        ArgumentTypeError: It is no number of at least 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _positive(text: str) -> float:
    """
    Raises:
        ArgumentTypeError: It is no number above 0.
    """
    number = _seconds(text)
    if number == 0.0:
        raise argparse.ArgumentTypeError("must be above 0")
    return number


def _seconds(text: str) -> float:
    """A time that may be 0, and infinite.

    Raises:
        ArgumentTypeError: It is none.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0.0:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return seconds


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Gives the parser an option for every field of EngineConfig."""
    for option in dataclasses.fields(EngineConfig):
        # An option without a default of its own says in its help what stands in for it.
        shown = "" if option.default is None else " (default: %(default)s)"
        parser.add_argument(
            "--" + option.name.replace("_", "-"),
            default=option.default,
            help=option.metadata["help"] + shown,
            **_argument_type(option_types()[option.name]),
        )


def _argument_type(hint: Any) -> dict[str, Any]:
    """argparse's keywords for an option's type."""
    kind = _kind(hint)
    if kind is bool:
        # With bool for a type every word would be true, "false" too.
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    return {"type": kind}


def _kind(hint: Any) -> Any:
    """What an option's words are read as: the first of its types, or a Literal."""
    if get_origin(hint) is Literal:
        return hint
    return (get_args(hint) or (hint,))[0]


def read_words(words: Mapping[str, Any]) -> dict[str, Any]:
    """Values of options that are given as name=value: what the command line would make of them.

    Args:
        words: By the option's name; true or false for what is on or off. What is no text is a value already, and
            an unknown name is left to `EngineConfig.from_options`.

    Raises:
        ConfigError: A word that is no value of its option.
    """
    return {name: _read(name, value) if isinstance(value, str) else value for name, value in words.items()}


def _read(name: str, text: str) -> Any:
    kind = _kind(option_types().get(name, str))
    if kind is bool:
        if text not in ("true", "false"):
            raise ConfigError(f"{name} must be true or false, got {text!r}")
        return text == "true"
    if kind not in (int, float):
        return text
    try:
        return kind(text)
    except ValueError:
        wanted = "an integer" if kind is int else "a number"
        raise ConfigError(f"{name} must be {wanted}, got {text!r}") from None
