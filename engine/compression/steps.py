"""The language of `--steps`: what is done to a model, word by word, and last the scheme that it is stored in.

    layers=4 + prune=2of4,sparsegpt + gptq + int4:g64,lm_head=int8

Words are joined by plus signs, in the order of `WORDS`, at most one of each stage; `name[=argument[,argument…]]`. The
scheme has the form that `--quant` has (`engine.quant_spec`), its own commas and equals signs too: no plus signs occur
in it, so that it is what stands behind the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, Literal, get_args

from engine.errors import ConfigError
from engine.quant.plan import SCHEMES
from engine.quant_spec import CHOICES

PruningAlgorithm = Literal["magnitude", "wanda", "sparsegpt"]
RankChoice = Literal["energy", "budget"]

TWO_OF_FOUR = "2of4"


@dataclass(frozen=True, slots=True)
class Plain:
    """A step without arguments, like gptq."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class DropLayers:
    """Leaves out so many layers."""

    name: ClassVar[str] = "layers"
    count: int

    def __str__(self) -> str:
        return f"{self.name}={self.count}"


@dataclass(frozen=True, slots=True)
class DropChannels:
    """Leaves out at most this share of the MLPs' channels and of the KV heads."""

    name: ClassVar[str] = "channels"
    share: float

    def __str__(self) -> str:
        return f"{self.name}={self.share}"


@dataclass(frozen=True, slots=True)
class Prune:
    """Sets weights to zero.

    Attributes:
        share: That of each matrix; half if it is two of four.
        is_two_of_four: Whether two of each four consecutive weights along K are set to zero.
        algorithm: Which ones.
    """

    name: ClassVar[str] = "prune"
    share: float
    is_two_of_four: bool
    algorithm: PruningAlgorithm

    def __str__(self) -> str:
        pattern = TWO_OF_FOUR if self.is_two_of_four else f"{self.share}"
        return f"{self.name}={pattern},{self.algorithm}"


@dataclass(frozen=True, slots=True)
class LowRank:
    """Makes two factors of matrices.

    Attributes:
        by: Whether each keeps so much of its energy, or all together take so much of their bytes.
        amount: That share.
        is_whitened: Whether the error at the output is made small, instead of that of the weight.
    """

    name: ClassVar[str] = "lowrank"
    by: RankChoice
    amount: float
    is_whitened: bool

    def __str__(self) -> str:
        return f"{self.name}={self.by}{self.amount:g},{'svd-llm' if self.is_whitened else 'svd'}"


Step = Plain | DropLayers | DropChannels | Prune | LowRank


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """A row of the language.

    Attributes:
        name: What stands before the equals sign.
        stage: Steps of the same stage exclude each other.
        help: What it does, for `--help`; lines.
        kinds: The kinds of schemes that it is for.
        form: Its arguments, for `--help`.
        parse: From the arguments to the step; None if it has none.
    """

    name: str
    stage: Literal[
        "layers",
        "channels",
        "rotation",
        "pruning",
        "low rank",
        "scaling",
        "ranges",
        "rounding",
        "tuning",
    ]
    help: tuple[str, ...]
    kinds: tuple[str, ...] = CHOICES
    form: str = ""
    parse: Callable[[Sequence[str]], Step] | None = None


def _number(text: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(text)
    except ValueError:
        return 0


def _parse_layers(arguments: Sequence[str]) -> Step:
    count = _number(arguments[0], int) if len(arguments) == 1 else 0
    if count < 1:
        raise ConfigError(f"steps: layers={','.join(arguments)}: must say how many are left out, layers=4")
    return DropLayers(int(count))


def _parse_channels(arguments: Sequence[str]) -> Step:
    share = _number(arguments[0], float) if len(arguments) == 1 else 0
    if not 0 < share < 1:
        raise ConfigError(
            f"steps: channels={','.join(arguments)}: must be a share between 0 and 1, channels=0.2"
        )
    return DropChannels(share)


def _parse_prune(arguments: Sequence[str]) -> Step:
    known = get_args(PruningAlgorithm)
    algorithm = next((name for name in known if list(arguments[1:]) == [name]), None)
    is_two_of_four = arguments[0] == TWO_OF_FOUR
    share = 0.5 if is_two_of_four else _number(arguments[0], float)
    if algorithm is None or not 0 < share < 1:
        raise ConfigError(
            f"steps: prune={','.join(arguments)}: must be a share between 0 and 1, or {TWO_OF_FOUR}, and one of "
            f"{', '.join(known)}: prune=0.5,wanda"
        )
    return Prune(share, is_two_of_four, algorithm)


def _parse_low_rank(arguments: Sequence[str]) -> Step:
    by = next((known for known in get_args(RankChoice) if arguments[0].startswith(known)), None)
    amount = 0.0 if by is None else _number(arguments[0].removeprefix(by), float)
    if by is None or not 0 < amount < 1 or list(arguments[1:]) not in (["svd"], ["svd-llm"]):
        raise ConfigError(
            f"steps: lowrank={','.join(arguments)}: must be energy or budget with a share between 0 and 1, and one "
            "of svd, svd-llm: lowrank=budget0.8,svd-llm"
        )
    return LowRank(by, amount, arguments[1] == "svd-llm")


ROUNDED = tuple(kind for kind in CHOICES if SCHEMES[kind].round is not None)
"""Kinds of schemes that steps which look for grids are not for, nor published formats."""

WORDS = (
    Word(
        name="layers",
        stage="layers",
        help=("leaves out the N layers that turn the hidden states least (block influence)",),
        form="=N",
        parse=_parse_layers,
    ),
    Word(
        name="channels",
        stage="channels",
        help=(
            "leaves out this share of the MLPs' channels and of the KV heads, at most: those that add",
            "least; the same number in every layer, so that a multiple of 64 channels stays",
        ),
        form="=SHARE",
        parse=_parse_channels,
    ),
    Word(
        name="hadamard",
        stage="rotation",
        help=("rotates the model so that no channel stands out; unties embeddings; not for Gemma 3",),
    ),
    Word(
        name="prune",
        stage="pruning",
        help=(
            "sets a share of each matrix of the layers to zero, or two of each four weights along",
            "K (2of4), by magnitude, wanda (weight times input) or sparsegpt (those left make up for",
            "it); nothing is smaller or faster for it, but 2of4 under sparse24:int8 and sparse24:int4",
        ),
        kinds=tuple(kind for kind in CHOICES if SCHEMES[kind].has_zero),
        form="=SHARE,HOW",
        parse=_parse_prune,
    ),
    Word(
        name="lowrank",
        stage="low rank",
        help=(
            "makes two factors of each matrix of the layers where that saves bytes, of ranks that keep so",
            "much of the energy (energy0.95), or take so much of all their bytes (budget0.8); HOW is svd, or",
            "svd-llm, which knows the inputs; stored by lowrank:int8, lowrank:int4 and lowrank:none",
        ),
        kinds=("none", "int8", "int4"),
        form="=RANKS,HOW",
        parse=_parse_low_rank,
    ),
    Word(
        name="smoothquant",
        stage="scaling",
        help=("int8: moves the inputs' large channels into the weights, through norms and up_proj",),
        kinds=("none", "int8"),
    ),
    Word(
        name="awq",
        stage="scaling",
        help=("int4: gives channels with large inputs finer steps, through norms and up_proj",),
        kinds=("int4",),
    ),
    Word(
        name="rotate",
        stage="scaling",
        help=(
            "int4: spreads each weight over 128 along K, so that none stands out; products rotate their",
            "activations alike (int4:rotated), and any model may",
        ),
        kinds=("int4",),
    ),
    Word(
        name="percentile",
        stage="ranges",
        help=("int4, int8: grids in the range of 99.9 % of a group's values",),
        kinds=("int4", "int8"),
    ),
    Word(
        name="mse",
        stage="ranges",
        help=("int4, int8: grids in the range of least squared error, columns weighed by their inputs'",),
        kinds=("int4", "int8"),
    ),
    Word(
        name="kl",
        stage="ranges",
        help=("int4, int8: grids below a tensor's threshold of least divergence; made for int8",),
        kinds=("int4", "int8"),
    ),
    Word(
        name="clip",
        stage="ranges",
        help=("int4: grids of least error at the output; the ones behind awq if nothing is said",),
        kinds=("int4",),
    ),
    Word(
        name="rtn",
        stage="rounding",
        help=(f"to nearest; the rounding if none is said, and the only one for {' and '.join(ROUNDED)}",),
    ),
    Word(
        name="gptq",
        stage="rounding",
        help=("int4: later columns make up for the errors of earlier ones",),
        kinds=("int4",),
    ),
    Word(
        name="tune",
        stage="tuning",
        help=(
            "int4: gradient descent on scales and, without --symmetric, on minimums, which then are no",
            "whole zero-points; behind gptq the codes stay",
        ),
        kinds=("int4",),
    ),
)
"""In the one order that is allowed."""

_BY_NAME = {word.name: word for word in WORDS}
_NAMES = tuple(word.name for word in WORDS)

ORDER = " + ".join(
    "|".join(word.name for word in words) for _, words in groupby(WORDS, key=lambda word: word.stage)
)
"""The one order, for messages: words of a stage are joined by bars."""

ALGORITHMS = tuple(word.name for word in WORDS if word.parse is None)
"""The steps without arguments."""


def word_of(step: Step) -> Word:
    """The row of a step."""
    return _BY_NAME[step.name]


def parse_steps(text: str) -> tuple[Step, ...]:
    """Steps joined by plus signs, without a scheme behind them, with what is meant if nothing is said of rounding.

    Raises:
        ConfigError: An unknown step, bad arguments, two of a stage, or another order.
    """
    steps = [_parse_step(part.strip()) for part in text.split("+")]
    by_stage: dict[str, Step] = {}
    for step in steps:
        other = by_stage.setdefault(word_of(step).stage, step)
        if other is not step:
            raise ConfigError(f"steps: {other} and {step} do the same in {text!r}; keep one")
    ordered = sorted(steps, key=lambda step: _NAMES.index(step.name))
    if steps != ordered:
        right = " + ".join(map(str, ordered))
        raise ConfigError(f"steps: {text!r} is in an order that cannot be; write {right}")
    if not {"ranges", "rounding"} & set(by_stage):
        ordered.append(Plain("clip" if Plain("awq") in steps else "rtn"))
        ordered.sort(key=lambda step: _NAMES.index(step.name))
    return tuple(ordered)


def _parse_step(text: str) -> Step:
    name, separator, arguments = text.partition("=")
    word = _BY_NAME.get(name.strip())
    if word is None:
        raise ConfigError(f"steps: {text!r} is not known; steps are, in this order, {ORDER}")
    if word.parse is None:
        if separator:
            raise ConfigError(f"steps: {text!r}: {word.name} has no arguments; write {word.name}")
        return Plain(word.name)
    return word.parse([argument.strip() for argument in arguments.split(",")])
