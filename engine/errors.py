"""The engine's exceptions: each says what, where, and what to do in one line."""

from __future__ import annotations


class EngineError(Exception):
    """Base of every error the engine raises on purpose."""


class RequestError(EngineError, ValueError):
    """A request that cannot be served as asked.

    Attributes:
        field: The request field at fault (an OpenAI parameter name), or None for the whole body.
        code: A word that programs can test for.
    """

    def __init__(self, message: str, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.field, self.code = field, code


class ConfigError(EngineError, ValueError):
    """An engine option, or a combination of options, that cannot work."""


class ModelNotFoundError(EngineError):
    """The model is neither on this machine nor reachable."""


class CheckpointError(EngineError):
    """A checkpoint that is damaged, incomplete or of an unsupported kind; names the tensor or key."""


class EngineStartError(EngineError):
    """The engine process failed while starting; carries the original type, message and hint."""


class EngineDeadError(EngineError):
    """The engine process has ended; open requests cannot go on."""


class RankFailedError(EngineDeadError):
    """A rank of the engine died, fell silent or disagrees; names it, the step and the cause. All ranks were ended."""
