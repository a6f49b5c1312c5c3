"""Recipes: what a compressed checkpoint is to be, and by which steps (`engine.compression.steps`)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.compression.steps import (
    WORDS,
    DropChannels,
    DropLayers,
    LowRank,
    Plain,
    Prune,
    Step,
    parse_steps,
    word_of,
)
from engine.errors import ConfigError
from engine.models.config import ModelConfig
from engine.models.modules import ROLES, module_names
from engine.quant_spec import (
    CHOICES,
    EMBEDDING,
    KINDS,
    LM_HEAD,
    LOW_RANK,
    QuantSpec,
    SchemeSpec,
    parse_quant_spec,
    parse_scheme_spec,
)

_IN_LAYERS = ("pruning", "low rank", "scaling")
"""Stages that do nothing to the vocabulary projection and the embedding."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a checkpoint is compressed; made by `Recipe.parse`.

    Attributes:
        quant_spec: The scheme of each module, the vocabulary projection's and the embedding's said explicitly.
        is_symmetric: int4 codes around zero, instead of zero-points.
        steps: In their order, one among them that says how weights are rounded.
    """

    quant_spec: QuantSpec
    is_symmetric: bool
    steps: tuple[Step, ...]

    @staticmethod
    def parse(
        scheme: str, algorithm: str = "rtn", group_size: int | None = None, is_symmetric: bool = False
    ) -> Recipe:
        """A recipe from the words of the command.

        Args:
            scheme: A specification (`engine.quant_spec`). The vocabulary projection and the embedding stay floats
                unless a pattern names them.
            algorithm: Steps without a scheme behind them.
            group_size: Of the scheme before the first comma, where it says none itself.

        Raises:
            ConfigError: Words that are not known or do not fit together; says which would.
        """
        quant_spec = parse_quant_spec(_with_group(scheme, group_size))
        floats = SchemeSpec("none")
        ends = tuple((end, floats) for end in (LM_HEAD, EMBEDDING))
        quant_spec = QuantSpec(quant_spec.default, ends + quant_spec.rules)
        steps = parse_steps(algorithm)
        recipe = Recipe(quant_spec, is_symmetric, steps)
        recipe._check()
        if Plain("rotate") in steps:
            recipe = replace(recipe, quant_spec=quant_spec.rotated())
        recipe._check_rotated()
        return recipe

    @staticmethod
    def parse_steps(text: str, group_size: int | None = None, is_symmetric: bool = False) -> Recipe:
        """A recipe from what `--steps` says: steps, and last the scheme; see `parse`."""
        algorithm, _, scheme = text.rpartition("+")
        first = scheme.strip().partition(",")[0]
        if not any(first == kind or first.startswith(f"{kind}:") for kind in KINDS):
            raise ConfigError(
                f"steps: {text!r} must end with the scheme that it is stored in, one of {', '.join(CHOICES)}: "
                f"{text.strip()} + int8"
            )
        return Recipe.parse(scheme.strip(), algorithm or "rtn", group_size, is_symmetric)

    @property
    def algorithm(self) -> str:
        return "+".join(map(str, self.steps))

    @property
    def ranges(self) -> str | None:
        """The step that finds the ranges of the grids; None: they hold all weights."""
        return next((step.name for step in self.steps if word_of(step).stage == "ranges"), None)

    @property
    def compensates(self) -> bool:
        """Whether int4 weights make up for each other's rounding; else they are rounded to nearest."""
        return Plain("gptq") in self.steps

    @property
    def scaling(self) -> str | None:
        """The step that scales channels."""
        return next((step.name for step in self.steps if word_of(step).stage == "scaling"), None)

    @property
    def rotates(self) -> bool:
        return Plain("hadamard") in self.steps

    @property
    def tunes(self) -> bool:
        return Plain("tune") in self.steps

    @property
    def pruning(self) -> Prune | None:
        """The step that sets weights to zero, which then stay zero."""
        return next((step for step in self.steps if isinstance(step, Prune)), None)

    @property
    def low_rank(self) -> LowRank | None:
        """The step that makes two factors of matrices."""
        return next((step for step in self.steps if isinstance(step, LowRank)), None)

    @property
    def structure(self) -> tuple[DropLayers | DropChannels, ...]:
        """The steps that change the model's shape."""
        return tuple(step for step in self.steps if isinstance(step, DropLayers | DropChannels))

    @property
    def needs_inputs(self) -> bool:
        """Whether a layer's new weights depend on what goes into it, or their errors are told."""
        return self.quant_spec.is_quantized or self.scaling is not None or self.pruning is not None

    @property
    def has_float_minimums(self) -> bool:
        """Whether int4 groups may begin at values that are no whole multiples of their scales."""
        schemes = (self.quant_spec.default, *(words for _, words in self.quant_spec.rules))
        return self.tunes and not self.is_symmetric and any(words.kind == "int4" for words in schemes)

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
        Args:
            config: In the shape that the steps give it.

        Raises:
            ConfigError: A pattern names nothing in this model, matrices of one product differ, or the model cannot
                be rotated or pruned so.
        """
        self.quant_spec.check(module_names(config))
        for layer in range(config.num_layers):
            for role in ROLES:
                self.quant_spec.of_product(role.modules(f"model.layers.{layer}"))
        if self.rotates and config.has_post_norms:
            raise ConfigError(
                f"steps: hadamard: {config.family} has norms behind attention and MLP, which do not commute with "
                "a rotation; leave hadamard out"
            )
        if self.pruning is not None and self.pruning.is_two_of_four:
            for role in ROLES:
                if role.in_features(config) % 4:
                    raise ConfigError(
                        f"steps: {self.pruning}: {role.projections[0].name} has {role.in_features(config)} inputs, "
                        "which are not whole fours; give a share"
                    )

    def _check(self) -> None:
        rules = self.quant_spec.rules
        # Rules that give the ends to nothing are there always.
        layers = [self.quant_spec.default] + [
            words for pattern, words in rules if pattern not in (LM_HEAD, EMBEDDING)
        ]
        said = [self.quant_spec.default] + [words for _, words in rules[2:]]
        if of_files := sorted({words.kind for words in said} - set(CHOICES)):
            raise ConfigError(
                f"scheme: {of_files[0]} is how a GGUF file is stored, which llama.cpp's llama-quantize makes; "
                f"take one of {', '.join(CHOICES)}"
            )
        # A step finds the grid that a sparse scheme shares with its dense one.
        kinds, in_layers = {words.dense.kind for words in said}, {words.dense.kind for words in layers}
        for words in said:
            if words.activations != "default":
                raise ConfigError(
                    f"scheme: {words}: how activations are quantized is said when serving (--quant); "
                    f"leave it out, or say {words.storage}:weight-only"
                )
        self._check_pruning(in_layers)
        self._check_low_rank(layers)
        for step in self.steps:
            word = word_of(step)
            # Floats among quantized modules are not what a step is asked for.
            there = in_layers if word.stage in _IN_LAYERS else kinds
            there = there - {"none"} or {"none"}
            if not there & set(word.kinds):
                fitting = ", ".join(word.name for word in WORDS if there & set(word.kinds))
                raise ConfigError(
                    f"steps: {step} is for {' or '.join(word.kinds)}, the scheme has "
                    f"{' and '.join(sorted(there))}, which takes {fitting}"
                )
        changing = self.rotates or self.scaling or self.pruning or self.low_rank or self.structure
        if kinds == {"none"} and not changing:
            raise ConfigError(
                f"scheme: none with {self.algorithm} changes nothing; give another scheme, or a step for none: "
                "layers, channels, hadamard, prune, lowrank or smoothquant"
            )
        if self.is_symmetric and "int4" not in kinds:
            raise ConfigError(
                "symmetric: is said of int4, other schemes have no choice; leave --symmetric out"
            )

    def _check_pruning(self, kinds: set[str]) -> None:
        if self.pruning is None:
            return
        if without_zero := sorted(kinds - set(word_of(self.pruning).kinds)):
            raise ConfigError(
                f"steps: {self.pruning}: {without_zero[0]} does not store zeros exactly; take one of "
                f"{', '.join(word_of(self.pruning).kinds)}"
            )
        if self.has_float_minimums:
            raise ConfigError(
                f"steps: {self.pruning}: tune moves int4's minimums to where zero is no code; add --symmetric, or "
                "leave tune out"
            )

    def _check_low_rank(self, layers: list[SchemeSpec]) -> None:
        factored = [words for words in layers if words.is_low_rank]
        if self.low_rank is None:
            if factored:
                raise ConfigError(
                    f"steps: {factored[0]} stores factors, which the step lowrank makes: "
                    f"lowrank=budget0.8,svd-llm + {factored[0]}"
                )
            return
        if not factored:
            raise ConfigError(
                f"steps: {self.low_rank} makes factors, which no module's scheme stores; end with one of "
                f"{', '.join(kind for kind in CHOICES if kind.startswith(LOW_RANK))}"
            )
        if self.quant_spec.of(LM_HEAD).is_low_rank:
            raise ConfigError(f"scheme: {LM_HEAD} does not become factors; give it another scheme")
        if ranked := next((words for words in factored if words.rank), None):
            raise ConfigError(
                f"scheme: {ranked}: ranks are chosen by {self.low_rank}; leave r{ranked.rank} out"
            )
        if self.pruning is not None:
            raise ConfigError(
                f"steps: {self.low_rank} fills the zeros of {self.pruning}; leave one of them out"
            )

    def _check_rotated(self) -> None:
        schemes = (self.quant_spec.default, *(words for _, words in self.quant_spec.rules))
        if self.pruning is not None and any(words.is_rotated for words in schemes):
            raise ConfigError(
                f"steps: {self.pruning}: a rotation leaves no zeros; leave it out, or rotate (int4:rotated)"
            )
        if self.scaling == "awq" and any(words.is_rotated for words in schemes):
            raise ConfigError("steps: awq and rotate do the same to int4:rotated; keep one")


def _with_group(scheme: str, group_size: int | None) -> str:
    """The specification with --group in its place."""
    if group_size is None:
        return scheme
    first, separator, rest = scheme.partition(",")
    kind = parse_scheme_spec(first).kind
    if any(word.startswith("g") and word[1:].isdecimal() for word in first.split(":")):
        raise ConfigError(f"group: {first} says the size of groups already; leave --group out")
    grammar = KINDS[kind]
    if not grammar.groups:
        raise ConfigError(f"group: {kind} has no choice of groups; leave --group out")
    if group_size == 0 and 0 not in grammar.groups and not grammar.default_group:
        return scheme  # whole rows are what is meant if nothing is said
    return f"{first}:g{group_size}{separator}{rest}"
