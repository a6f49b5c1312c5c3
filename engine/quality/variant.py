"""Variants: the choices of compression that are compared, by the words that name them.

    SPECIFICATION                       what `--quant` takes (`engine.quant_spec`), rounded while it is loaded
    SPECIFICATION:ALGORITHM[:seed=N]    a checkpoint that `engine.compression` makes first:
                                        int4:g128:gptq, int8:token:smoothquant, int4:hadamard+gptq
    auto                                the model as it is stored
    DIRECTORY or dir=PATH               a checkpoint that is there

each with :kv=TYPE for the cache. Commas separate variants; a rule of a mixed specification follows its scheme as in
`--quant`, with all words of the variant before it: int8,int4:g64:gptq,*.down_proj=int8,none are three variants.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from engine.compression.recipe import Recipe
from engine.compression.steps import ALGORITHMS, Plain
from engine.config import CacheType, EngineConfig
from engine.errors import ConfigError
from engine.quality.making import is_calibrated
from engine.quant_spec import CHOICES, KINDS, QuantSpec, parse_quant_spec

Options = dict[str, Any]
"""Options of EngineConfig by name."""

AUTO = "auto"
DIRECTORY = "dir="
_RULE = re.compile(r"[^:=]+=")
"""How a rule of a mixed specification begins, and no variant but "dir=PATH"."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the choices that are compared.

    Attributes:
        name: As it was asked for.
        options: What it sets; the model too, if it is a directory.
        recipe: Of the checkpoint, where it is one that is made first.
        seed: Of the calibration, where the name says it.
    """

    name: str
    options: Options
    recipe: Recipe | None = None
    seed: int | None = None

    def seeds(self, count: int) -> list[int]:
        """The calibrations that it is made with: that of its name, else as many as are wanted if it has any."""
        if self.seed is not None:
            return [self.seed]
        return list(range(count if self.recipe is not None and is_calibrated(self.recipe) else 1))

    def config(self, model: str, **common: Any) -> EngineConfig:
        """The engine that runs it.

        Args:
            model: The one that is compressed, or what was made of it.
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
    head, comma, rules = text.partition(",")
    first, *words = head.split(":")
    path = first.removeprefix(DIRECTORY)
    is_directory = first not in (AUTO, *(kind.partition(":")[0] for kind in KINDS))
    if is_directory and not (path and Path(path).is_dir()):
        known = f"{AUTO}, {', '.join(CHOICES)}, a directory, {DIRECTORY}PATH"
        raise ConfigError(f"variant {text!r}: {first!r} is neither known nor a directory; known are {known}")
    named: dict[str, str] = {}
    scheme = [first]
    for word in words:
        name, separator, value = word.partition("=")
        if all(step in ALGORITHMS for step in word.split("+")):
            name, separator, value = "algorithm", "=", word
        if (
            name not in (("kv",) if is_directory or first == AUTO else ("kv", "seed", "algorithm"))
            or not separator
        ):
            scheme.append(word)
        elif name in named:
            raise ConfigError(f"variant {text!r}: {word!r} is the second of its kind; keep one")
        else:
            named[name] = value
    try:
        return _assemble(text, path if is_directory else None, ":".join(scheme) + comma + rules, named)
    except ConfigError as error:
        raise ConfigError(f"variant {text!r}: {error}") from error


def _assemble(text: str, directory: str | None, quant_spec: str, named: dict[str, str]) -> Variant:
    """The variant of these parts.

    Args:
        specification: What is left besides them.
        named: The values of "kv", "seed" and "algorithm".
    """
    options: Options = {}
    if "kv" in named:
        if named["kv"] not in get_args(CacheType):
            raise ConfigError(f"kv must be one of {', '.join(get_args(CacheType))}, got {named['kv']!r}")
        options["kv_cache_dtype"] = named["kv"]
    if directory is not None:
        if quant_spec.removeprefix(DIRECTORY) != directory:
            raise ConfigError("after a directory there may be kv=TYPE only")
        return Variant(text, options | {"model": directory})
    if quant_spec == AUTO:
        return Variant(text, options | {"quant": AUTO})
    given = parse_quant_spec(quant_spec)
    # Said again where the checkpoint is served: activations are no part of what is stored.
    options["quant"] = quant_spec
    if "algorithm" not in named:
        if "seed" in named:
            known = ", ".join(ALGORITHMS)
            raise ConfigError(f"seed={named['seed']} is of a calibration: name an algorithm, {known}")
        return Variant(text, options)
    stored = QuantSpec(
        replace(given.default, activations="default"),
        tuple((pattern, replace(words, activations="default")) for pattern, words in given.rules),
    )
    recipe = Recipe.parse(str(stored), named["algorithm"])
    if Plain("rotate") in recipe.steps:
        options["quant"] = str(given.rotated())
    if "seed" not in named:
        return Variant(text, options, recipe)
    if not (named["seed"].isdecimal() and is_calibrated(recipe)):
        raise ConfigError(
            f"seed={named['seed']} must be a number, and {recipe.algorithm} one that calibrates"
        )
    return Variant(text, options, recipe, int(named["seed"]))


def parse_variants(text: str) -> list[Variant]:
    """The variants of a list with commas.

    Raises:
        ConfigError: As `parse_variant`; or a name occurs twice.
    """
    names: list[str] = []
    for piece in text.split(","):
        if names and _RULE.match(piece) and not piece.startswith(DIRECTORY):
            names[-1] += f",{piece}"
        else:
            names.append(piece)
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"variants: {name!r} is there twice; name each once")
    return [parse_variant(name) for name in names]
