"""Specifications: what `--quant` says about how each module's weights are stored and multiplied.

    scheme                  none, int8, int4, nf4, codebook4, sparse24:int8, sparse24:int4, lowrank:none, lowrank:int8
                            or lowrank:int4, with words after colons: int4:g64
    scheme,pattern=scheme   the first for all modules, then another one for those whose names match, like
                            int4:g64,*.down_proj=int8,model.layers.0.*=none; the last pattern that matches decides

    word                    of          means
    g32, g64, g128, …       int4, int8  elements along K that share a scale (int4, sparse24:int4: 32 if not said)
    g0                      int4        whole rows share one
    token, groups,          int8        how activations are quantized: one scale a token, one for each 32 along K, or
    two-terms                           as two int8 terms; if not said, what the device does best
    weight-only             int8        activations stay floats
    rotated                 int4        weights are stored, and activations read, rotated in blocks of 128 along K
    r64, r128, …            lowrank     the rank of the factors, which a checkpoint of such says itself

The vocabulary projection (lm_head) and the embedding (model.embed_tokens) keep eight bits in groups of 32 under
schemes of four, unless a pattern names them, and the embedding does so under int8: they are the layers whose rounding
shows most in the tokens, and a small part of the weights of all but the smallest models.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal, get_args

from engine.errors import ConfigError

ActivationTerms = Literal["default", "token", "groups", "two-terms"]

LM_HEAD = "lm_head"
EMBEDDING = "model.embed_tokens"
ENDS = (LM_HEAD, EMBEDDING)

TABLE_GROUP_SIZE = 32
"""Elements along K that share a scale in an embedding of eight bits, and in the head beside layers of four."""

_GROUP = re.compile(r"g(\d+)")
_GROUP_STEP = 32
_WEIGHT_ONLY = "weight-only"
_RANK = re.compile(r"r([1-9]\d*)")
LOW_RANK = "lowrank:"
"""How the kinds begin that store two factors."""
_ROTATED = "rotated"


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeGrammar:
    """What may be said of one kind of scheme, and how the commands explain it.

    Attributes:
        help: Lines of `python -m engine.quant --help`: how it is written, and what is stored.
        groups: Sizes of groups along K that messages name, 0 for whole rows; empty where there is no choice.
        default_group: The size if none is said.
        words: What else may follow, of which one is kept.
        is_for_head: Whether lm_head gets it without being named; else lm_head keeps eight bits in groups.
        is_exact: Whether int8 activations are multiplied with it, in sums that are exact on every device.
        is_block_type: Whether it is a type of GGUF's, which keeps weights that are of that type already.
        dense: The kind whose codes it stores in another form: without zeros, or those of two factors; empty: its own.
    """

    help: tuple[tuple[str, str], ...]
    groups: tuple[int, ...] = ()
    default_group: int = 0
    words: tuple[str, ...] = ()
    is_for_head: bool = False
    is_exact: bool = False
    is_block_type: bool = False
    dense: str = ""

    def has_group(self, size: int) -> bool:
        """Whether so many elements along K may share a scale; more than 128 occur in others' checkpoints.

        What has a dense kind is made by this engine alone.
        """
        if self.dense:
            return size in self.groups
        return bool(self.groups) and size % _GROUP_STEP == 0 and (size > 0 or 0 in self.groups)


KINDS: dict[str, SchemeGrammar] = {
    "none": SchemeGrammar(help=(("none", "float16"),), is_for_head=True),
    "int8": SchemeGrammar(
        help=(
            (
                "int8[:g32|g64|g128]",
                "eight bits, a scale a row or for so many elements; served with int8 activations",
            ),
            ("int8[:gN]:weight-only", "the same, served with float activations"),
        ),
        groups=(32, 64, 128),
        words=("token", "groups", "two-terms", _WEIGHT_ONLY),
        is_for_head=True,
        is_exact=True,
    ),
    "int4": SchemeGrammar(
        help=(
            (
                "int4[:g32|g64|g128|g0]",
                "four bits, a scale and a zero-point for so many elements; g0: for whole rows",
            ),
            ("int4[:gN]:rotated", "the same, rotated in blocks of 128; activations are rotated when served"),
        ),
        groups=(32, 64, 128, 0),
        default_group=32,
        words=(_ROTATED,),
    ),
    "nf4": SchemeGrammar(
        help=(("nf4", "quantiles of the normal distribution, a scale for 64 elements"),),
    ),
    "codebook4": SchemeGrammar(
        help=(
            (
                "codebook4",
                "sixteen values for each row, by k-means; columns count by how large their inputs are",
            ),
        ),
    ),
    "sparse24:int8": SchemeGrammar(
        help=(
            ("sparse24:int8", "of each four along K the two that are not zero, eight bits, a scale a row"),
        ),
        is_exact=True,
        dense="int8",
    ),
    "sparse24:int4": SchemeGrammar(
        help=(
            ("sparse24:int4[:g32|g64|g128]", "the same, four bits around zero, a scale for so many elements"),
        ),
        groups=(32, 64, 128),
        default_group=32,
        dense="int4",
    ),
    "lowrank:none": SchemeGrammar(
        help=(("lowrank:none", "two factors, float16; the step lowrank makes them"),),
        dense="none",
    ),
    "lowrank:int8": SchemeGrammar(
        help=(("lowrank:int8", "two factors, each as int8"),),
        is_exact=True,
        dense="int8",
    ),
    "lowrank:int4": SchemeGrammar(
        help=(("lowrank:int4[:g32|g64|g128]", "two factors, each as int4"),),
        groups=(32, 64, 128),
        default_group=32,
        dense="int4",
    ),
    **{
        kind: SchemeGrammar(help=(), is_for_head=True, is_block_type=True)
        for kind in (
            "q4_0",
            "q4_1",
            "q4_k",
            "q5_0",
            "q5_1",
            "q5_k",
            "q6_k",
            "iq4_nl",
            "iq4_xs",
            "mxfp4",
        )
    },
}
"""The kinds of schemes as they are written; their arithmetic is registered in `engine.quant.plan.SCHEMES`."""

CHOICES = tuple(kind for kind, grammar in KINDS.items() if not grammar.is_block_type)
"""What any weights can be made of; the others are what `--quant auto` makes of a GGUF file's."""


@dataclass(frozen=True, slots=True)
class SchemeSpec:
    """What is said of one module.

    Attributes:
        kind: One of `KINDS`.
        group_size: Elements along K that share a scale; 0 is whole rows, or that there is no choice.
        activations: How int8 products quantize their activations.
        is_weight_only: int8 weights × float activations.
        rank: Of low-rank factors; 0: there are none, or it is not said.
        is_rotated: Weights and activations are rotated in blocks along K.
    """

    kind: str
    group_size: int = 0
    activations: ActivationTerms = "default"
    is_weight_only: bool = False
    rank: int = 0
    is_rotated: bool = False

    @property
    def storage(self) -> str:
        """What is stored, without what is said of activations: "int4:g64"."""
        has_size = self.group_size or 0 in KINDS[self.kind].groups
        size = f":g{self.group_size}" if has_size else ""
        rank = f":r{self.rank}" if self.rank else ""
        return self.kind + size + rank + (f":{_ROTATED}" if self.is_rotated else "")

    @property
    def dense(self) -> SchemeSpec:
        """The scheme of the same codes that stores a whole matrix, zeros too; of most kinds the same one."""
        return replace(self, kind=KINDS[self.kind].dense or self.kind, rank=0)

    @property
    def is_sparse(self) -> bool:
        """Whether zeros are not stored."""
        return bool(KINDS[self.kind].dense) and not self.is_low_rank

    @property
    def is_low_rank(self) -> bool:
        """Whether two factors are stored."""
        return self.kind.startswith(LOW_RANK)

    @property
    def stacks(self) -> bool:
        """Whether its product can be one with others that are stored in another way."""
        if KINDS[self.kind].is_block_type:
            return True
        is_grouped = self.kind == "int8" and self.group_size > 0 and not self.is_weight_only
        return is_grouped and self.activations == "default"

    def __str__(self) -> str:
        terms = "" if self.activations == "default" else f":{self.activations}"
        return self.storage + terms + (":weight-only" if self.is_weight_only else "")


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """A scheme for every module.

    Attributes:
        default: That of modules which no pattern names.
        rules: Pairs of a pattern (as `fnmatch` has it) and what modules whose names match get; the last one counts.
    """

    default: SchemeSpec
    rules: tuple[tuple[str, SchemeSpec], ...] = ()

    def of(self, module: str) -> SchemeSpec:
        """What a module gets, "model.layers.0.mlp.down_proj" for one."""
        for pattern, words in reversed(self.rules):
            if fnmatchcase(module, pattern):
                return words
        if module == LM_HEAD:
            dense = self.default.dense
            is_for_head = KINDS[dense.kind].is_for_head
            return dense if is_for_head else SchemeSpec("int8", group_size=TABLE_GROUP_SIZE)
        keeps = self.default.dense.kind == "none" or KINDS[self.default.kind].is_block_type
        if module == EMBEDDING:
            return self.default.dense if keeps else SchemeSpec("int8")
        return self.default

    def of_product(self, modules: Sequence[str]) -> list[SchemeSpec]:
        """What each of some modules gets that share one product, like q_proj, k_proj and v_proj of a layer.

        Raises:
            ConfigError: They get what cannot be one product.
        """
        found = {module: self.of(module) for module in modules}
        if len(set(found.values())) > 1 and not all(words.stacks for words in found.values()):
            listed = ", ".join(f"{module} {words}" for module, words in found.items())
            raise ConfigError(
                f"quant: {listed}: they are multiplied as one matrix; give them the same scheme, "
                f"e.g. with the pattern {modules[0].rpartition('.')[0]}.*"
            )
        return list(found.values())

    @staticmethod
    def covering(schemes: Mapping[str, SchemeSpec], modules: Iterable[str]) -> QuantSpec:
        """One that gives modules what they have in `schemes`, and keeps as floats those which are not in it.

        Head and embedding, if they are not in it, are left to the default.
        """
        default = Counter(schemes.values()).most_common(1)[0][0]
        floats = SchemeSpec("none")
        found = {name: schemes.get(name, floats) for name in modules if name in schemes or name not in ENDS}
        return QuantSpec(default, tuple((name, words) for name, words in found.items() if words != default))

    def check(self, modules: Iterable[str]) -> None:
        """
        Raises:
            ConfigError: A pattern names none of the model's modules, or the embedding gets what no table has.
        """
        known = sorted(modules)
        for pattern, _ in self.rules:
            if not any(fnmatchcase(module, pattern) for module in known):
                raise ConfigError(
                    f"quant: no module matches {pattern!r}; there are {known[0]}, {known[-1]} and others between them"
                )
        table = self.of(EMBEDDING)
        if str(table) not in ("none", "int8", "int8:g32") and not KINDS[table.kind].is_block_type:
            raise ConfigError(f"quant: {EMBEDDING} cannot be {table}; a table is none or int8")

    def rotated(self) -> QuantSpec:
        """The same with what can be rotated stored so."""

        def rotate(words: SchemeSpec) -> SchemeSpec:
            return replace(words, is_rotated=_ROTATED in KINDS[words.kind].words)

        rules = tuple((pattern, rotate(words)) for pattern, words in self.rules)
        return QuantSpec(rotate(self.default), rules)

    @property
    def is_quantized(self) -> bool:
        """Whether any module may be."""
        return any(words.kind != "none" for words in self._all())

    @property
    def is_exact(self) -> bool:
        """Whether all products are of int8 weights and int8 activations, which have exact sums on every device."""
        return all(KINDS[words.kind].is_exact and not words.is_weight_only for words in self._all())

    @property
    def has_low_rank(self) -> bool:
        """Whether any module may be two factors."""
        return any(words.is_low_rank for words in self._all())

    def _all(self) -> list[SchemeSpec]:
        return [self.default] + [words for _, words in self.rules]

    def __str__(self) -> str:
        return ",".join([str(self.default)] + [f"{pattern}={words}" for pattern, words in self.rules])


def parse_quant_spec(text: str) -> QuantSpec:
    """
    Raises:
        ConfigError: The text is no specification; names what was not understood and what would be.
    """
    first, *rest = text.split(",")
    rules = []
    for rule in rest:
        pattern, separator, scheme = rule.partition("=")
        if not (pattern and separator):
            raise ConfigError(f"quant: {rule!r} in {text!r} is not of the form pattern=scheme")
        rules.append((pattern, parse_scheme_spec(scheme)))
    return QuantSpec(parse_scheme_spec(first), tuple(rules))


def parse_scheme_spec(text: str) -> SchemeSpec:
    """A scheme with its words, "int4:g64".

    Raises:
        ConfigError: As `parse_quant_spec`.
    """
    kind, *words = text.split(":")
    if words and f"{kind}:{words[0]}" in KINDS:
        kind = f"{kind}:{words.pop(0)}"
    if kind not in KINDS:
        raise ConfigError(f"quant: must be one of {', '.join(CHOICES)}, got {kind!r}")
    grammar = KINDS[kind]
    groups, terms, ranks = [], [], []
    for word in words:
        group = _GROUP.fullmatch(word)
        rank = _RANK.fullmatch(word)
        if rank and kind.startswith(LOW_RANK):
            ranks.append(int(rank[1]))
        elif group and grammar.has_group(int(group[1])):
            groups.append(int(group[1]))
        elif word in grammar.words:
            terms.append(word)
        else:
            known_ranks = ["a rank like r64"] if kind.startswith(LOW_RANK) else []
            known = ", ".join([*(f"g{size}" for size in grammar.groups), *grammar.words, *known_ranks])
            known = known or "nothing"
            raise ConfigError(f"quant: {word!r} in {text!r} is not known; after {kind} there may be {known}")
    if max(len(groups), len(terms), len(ranks)) > 1:
        raise ConfigError(f"quant: {text!r} has two words for one thing; keep one of them")
    return SchemeSpec(
        kind,
        groups[0] if groups else grammar.default_group,
        next((term for term in get_args(ActivationTerms) if term in terms), "default"),
        _WEIGHT_ONLY in terms,
        ranks[0] if ranks else 0,
        _ROTATED in terms,
    )
