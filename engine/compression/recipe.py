"""Recipes: what a quantized checkpoint is to be, and the steps that find its numbers.

An algorithm is steps joined by +, each stage at most once and in this order:

    hadamard                                    rotates the residual stream, so that no channel stands out
    smoothquant | awq                           scales channels, undone in what feeds them
    rtn | percentile | mse | kl | clip | gptq   rounds (rtn if none is said; behind awq clip, as its authors do)
    tune                                        moves the grids to where the outputs err least
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import ConfigError
from engine.models.config import ModelConfig
from engine.models.modules import ROLES, module_names
from engine.quant_spec import CHOICES, EMBEDDING, KINDS, LM_HEAD, QuantSpec, SchemeSpec, parse_quant_spec

STAGES: tuple[tuple[str, ...], ...] = (
    ("hadamard",),
    ("smoothquant", "awq"),
    ("rtn", "percentile", "mse", "kl", "clip", "gptq"),
    ("tune",),
)
ALGORITHMS = tuple(step for stage in STAGES for step in stage)
"""Each step by itself is an algorithm, too."""

_KINDS = {
    "hadamard": CHOICES,
    "smoothquant": ("none", "int8"),
    "awq": ("int4",),
    "rtn": CHOICES,
    "percentile": ("int4", "int8"),
    "mse": ("int4", "int8"),
    "kl": ("int4", "int8"),
    "clip": ("int4",),
    "gptq": ("int4",),
    "tune": ("int4",),
}
"""The kinds of schemes that each step is for."""

_IN_LAYERS = ("smoothquant", "awq")
"""Steps that do nothing to the vocabulary projection and the embedding."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a checkpoint is quantized; made by `Recipe.parse`.

    Attributes:
        specification: The scheme of each module, the vocabulary projection's and the embedding's said explicitly.
        is_symmetric: int4 codes around zero, instead of zero-points.
        steps: Of the algorithm, a rounding among them.
    """

    quant_spec: QuantSpec
    is_symmetric: bool
    steps: tuple[str, ...]

    @staticmethod
    def parse(
        scheme: str, algorithm: str = "rtn", group_size: int | None = None, is_symmetric: bool = False
    ) -> Recipe:
        """A recipe from the words of the command.

        Args:
            scheme: A specification (`engine.quant_spec`). The vocabulary projection and the embedding stay floats
                unless a pattern names them.
            group_size: Of the scheme before the first comma, where it says none itself.

        Raises:
            ConfigError: Words that are not known or do not fit together; says which would.
        """
        quant_spec = parse_quant_spec(_with_group(scheme, group_size))
        floats = SchemeSpec("none")
        ends = tuple((end, floats) for end in (LM_HEAD, EMBEDDING))
        quant_spec = QuantSpec(quant_spec.default, ends + quant_spec.rules)
        recipe = Recipe(quant_spec, is_symmetric, _parse_steps(algorithm))
        recipe._check()
        return recipe

    @property
    def algorithm(self) -> str:
        return "+".join(self.steps)

    @property
    def rounding(self) -> str:
        """The step that rounds."""
        return next(step for step in self.steps if step in STAGES[2])

    @property
    def scaling(self) -> str | None:
        """The step that scales channels."""
        return next((step for step in self.steps if step in STAGES[1]), None)

    @property
    def rotates(self) -> bool:
        return "hadamard" in self.steps

    @property
    def tunes(self) -> bool:
        return "tune" in self.steps

    @property
    def has_float_minimums(self) -> bool:
        """Whether int4 groups may begin at values that are no whole multiples of their scales."""
        return self.tunes and not self.is_symmetric

    @property
    def description(self) -> dict[str, object]:
        """The recipe as JSON values, for the record beside the checkpoint."""
        return {
            "scheme": str(self.quant_spec),
            "symmetric": self.is_symmetric,
            "algorithm": self.algorithm,
        }

    def check_model(self, config: ModelConfig) -> None:
        """
        Raises:
            ConfigError: A pattern names nothing in this model, matrices of one product differ, or the model cannot
                be rotated.
        """
        self.quant_spec.check(module_names(config))
        for layer in range(config.num_layers):
            for role in ROLES:
                self.quant_spec.of_product(role.modules(f"model.layers.{layer}"))
        if self.rotates and config.has_post_norms:
            raise ConfigError(
                f"algorithm: hadamard: {config.family} has norms behind attention and MLP, which do not commute with "
                "a rotation; leave hadamard out"
            )

    def _check(self) -> None:
        rules = self.quant_spec.rules
        # Rules that give the ends to nothing are there always.
        layers = [self.quant_spec.default] + [
            words for pattern, words in rules if pattern not in (LM_HEAD, EMBEDDING)
        ]
        said = [self.quant_spec.default] + [words for _, words in rules[2:]]
        kinds, in_layers = {words.kind for words in said}, {words.kind for words in layers}
        for words in said:
            if words.activations != "default":
                raise ConfigError(
                    f"scheme: {words}: how activations are quantized is said when serving (--quant); "
                    f"leave it out, or say {words.storage}:weight-only"
                )
        if of_files := sorted(kinds - set(CHOICES)):
            raise ConfigError(
                f"scheme: {of_files[0]} is how a GGUF file is stored, which llama.cpp's llama-quantize makes; "
                f"take one of {', '.join(CHOICES)}"
            )
        for step in self.steps:
            # Floats among quantized modules are not what a step is asked for.
            there = in_layers if step in _IN_LAYERS else kinds
            there = there - {"none"} or {"none"}
            if not there & set(_KINDS[step]):
                fitting = ", ".join(step for step in ALGORITHMS if there & set(_KINDS[step]))
                raise ConfigError(
                    f"algorithm: {step} is for {' or '.join(_KINDS[step])}, the scheme has "
                    f"{' and '.join(sorted(there))}, which takes {fitting}"
                )
        if kinds == {"none"} and not (self.rotates or self.scaling):
            raise ConfigError(
                f"scheme: none with {self.algorithm} changes nothing; give another scheme, or hadamard or smoothquant"
            )
        if self.is_symmetric and "int4" not in kinds:
            raise ConfigError(
                "symmetric: is said of int4, other schemes have no choice; leave --symmetric out"
            )


def _with_group(scheme: str, group_size: int | None) -> str:
    """The specification with --group in its place."""
    if group_size is None:
        return scheme
    first, separator, rest = scheme.partition(",")
    kind, *words = first.split(":")
    if any(word.startswith("g") and word[1:].isdecimal() for word in words):
        raise ConfigError(f"group: {first} says the size of groups already; leave --group out")
    groups = KINDS[kind].groups if kind in KINDS else ()
    if not groups:
        raise ConfigError(f"group: {kind} has no choice of groups; leave --group out")
    if group_size == 0 and 0 not in groups:
        return scheme  # whole rows are what is meant if nothing is said
    return ":".join([kind, f"g{group_size}", *words]) + separator + rest


def _parse_steps(algorithm: str) -> tuple[str, ...]:
    """The steps, with the rounding that is meant if none is said.

    Raises:
        ConfigError: An unknown step, two of a stage, or another order.
    """
    steps = algorithm.split("+")
    known = "+".join("|".join(stage) for stage in STAGES)
    for step in steps:
        if step not in ALGORITHMS:
            raise ConfigError(f"algorithm: {step!r} is not known; steps are, in this order, {known}")
    for stage in STAGES:
        found = [step for step in steps if step in stage]
        if len(found) > 1:
            raise ConfigError(f"algorithm: {' and '.join(found)} do the same in {algorithm!r}; keep one")
    ordered = [step for step in ALGORITHMS if step in steps]
    if steps != ordered:
        raise ConfigError(
            f"algorithm: {algorithm!r} is in an order that cannot be; write {'+'.join(ordered)}"
        )
    if not set(steps) & set(STAGES[2]):
        ordered.append("clip" if "awq" in steps else "rtn")
        ordered.sort(key=ALGORITHMS.index)
    return tuple(ordered)
