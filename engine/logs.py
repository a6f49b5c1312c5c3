"""The lines of a server's log, as text or as JSON, each with what it knows of the request that it is about."""

from __future__ import annotations

import json
import logging
import re
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal, get_args

from engine.errors import ConfigError

LogFormat = Literal["text", "json"]

_about: ContextVar[dict[str, str]] = ContextVar("about")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def begin_request(**fields: str) -> None:
    """Lines of this task, and of those that it starts, are about a request from now on."""
    _about.set(dict(fields))


def note_request(**fields: str) -> None:
    """Adds to what the lines of the request say; nothing where there is none."""
    _about.get({}).update(fields)


def configure(log_format: str | None, level: int = logging.INFO) -> None:
    """Has this process write its log in the format, text by default.

    Raises:
        ConfigError: There is no such format.
    """
    log_format = log_format or "text"
    if log_format not in get_args(LogFormat):
        raise ConfigError(f"log_format must be one of {', '.join(get_args(LogFormat))}, got {log_format!r}")
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)


class TextFormatter(logging.Formatter):
    """The message, and in brackets what is known of the request. What would break or hide a line is escaped."""

    def format(self, record: logging.LogRecord) -> str:
        about = _about.get({})
        text = record.getMessage()
        if about:
            text += f" [{' '.join(f'{name}={value}' for name, value in about.items())}]"
            # It may hold what a client has sent.
            text = text.replace("\n", "\\n")
        text = _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)
        return text + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")


class JsonFormatter(logging.Formatter):
    """An object a line: time, level, logger, message, what is known of the request, and a failure's stack."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_about.get({}),
        }
        if record.exc_info:
            line["stack"] = self.formatException(record.exc_info)
        return json.dumps(line)
