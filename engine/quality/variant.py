"""Variants: the choices of compression that are compared, by the words that name them.

    none | int8 | int4[:g32|:g64|:g128|:g0] | DIRECTORY | dir=PATH, each with [:kv=TYPE]

A new scheme is an entry of `KNOWN`, a new way of making one a word of its entry.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from engine.config import CacheType, EngineConfig
from engine.errors import ConfigError

Options = dict[str, Any]
"""Options of EngineConfig by name."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What a variant's first word stands for.

    Attributes:
        options: What it sets.
        words: What may follow, each with what it sets.
    """

    options: Options
    words: dict[str, Options] = field(default_factory=dict)


KNOWN = {
    "none": Choice({"quant": "none"}),
    "int8": Choice({"quant": "int8"}),
    "int4": Choice({"quant": "int4"}, {f"g{size}": {"group_size": size} for size in (32, 64, 128, 0)}),
}
CACHE_WORDS: dict[str, Options] = {f"kv={kind}": {"kv_cache_dtype": kind} for kind in get_args(CacheType)}
"""What may follow every choice."""

DIRECTORY = "dir="


@dataclass(frozen=True, slots=True)
class Variant:
    """One of what is compared.

    Attributes:
        name: As it was asked for.
        options: What it sets; the model too, if it is a directory.
    """

    name: str
    options: Options

    def config(self, model: str, **common: Any) -> EngineConfig:
        """The engine that runs it.

        Args:
            model: The one that is compressed.
            common: Options that the variants share.

        Raises:
            ConfigError: Options that do not fit together.
        """
        return EngineConfig(**{"model": model, **common, **self.options})


def parse_variant(text: str) -> Variant:
    """The variant of this name.

    Raises:
        ConfigError: A word that is not known here, or a second one for the same option; names what is known.
    """
    first, *words = text.split(":")
    choice = KNOWN.get(first)
    if choice is None:
        path = first.removeprefix(DIRECTORY)
        if not (path and Path(path).is_dir()):
            known = f"{', '.join(KNOWN)}, a directory, {DIRECTORY}PATH"
            raise ConfigError(
                f"variant {text!r}: {first!r} is neither known nor a directory; known are {known}"
            )
        choice = Choice({"model": path})
    allowed = choice.words | CACHE_WORDS
    added: Options = {}
    for word in words:
        if word not in allowed:
            raise ConfigError(
                f"variant {text!r}: {word!r} is not known after {first}; known are {', '.join(allowed)}"
            )
        if added.keys() & allowed[word]:
            raise ConfigError(f"variant {text!r}: {word!r} is the second of its kind; keep one")
        added |= allowed[word]
    return Variant(text, choice.options | added)


def parse_variants(text: str) -> list[Variant]:
    """The variants of a list with commas.

    Raises:
        ConfigError: As `parse_variant`; or a name occurs twice.
    """
    names = text.split(",")
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"variants: {name!r} is there twice; name each once")
    return [parse_variant(name) for name in names]
