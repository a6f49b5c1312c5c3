"""Specifications: what modules get, and what is refused."""

from __future__ import annotations

import pytest

from engine.errors import ConfigError
from engine.quant_spec import QuantSpec, SchemeSpec, parse_quant_spec, parse_scheme_spec

DOWN = "model.layers.{}.mlp.down_proj"
QKV = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]


def test_the_last_pattern_that_matches_decides() -> None:
    quant_spec = parse_quant_spec("int4:g64,lm_head=int8,*.down_proj=int8:g32,model.layers.0.*=none")
    assert quant_spec.of(DOWN.format(0)) == SchemeSpec("none")
    assert quant_spec.of(DOWN.format(1)) == SchemeSpec("int8", 32)
    assert quant_spec.of("model.layers.10.mlp.up_proj") == SchemeSpec("int4", 64)
    assert parse_quant_spec(str(quant_spec)) == quant_spec


@pytest.mark.parametrize(
    ("text", "head", "table"),
    [
        ("none", "none", "none"),
        ("int8:token", "int8:token", "int8"),
        ("int8:g32", "int8:g32", "int8"),
        ("int4:g0", "int8:g32", "int8"),
        ("codebook4,lm_head=nf4", "nf4", "int8"),
        ("int8,*=none", "none", "none"),
        ("none,*.down_proj=int4", "none", "none"),
        ("sparse24:int8", "int8", "int8"),
        ("sparse24:int4:g64", "int8:g32", "int8"),
        ("lowrank:none:r16", "none", "none"),
        ("lowrank:int8:r16", "int8", "int8"),
        ("lowrank:int4:r16", "int8:g32", "int8"),
        ("int4:rotated", "int8:g32", "int8"),
    ],
)
def test_head_and_table_keep_eight_bits_unless_they_are_named(text: str, head: str, table: str) -> None:
    quant_spec = parse_quant_spec(text)
    assert str(quant_spec.of("lm_head")) == head
    assert str(quant_spec.of("model.embed_tokens")) == table


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("int4", "int4:g32"),
        ("int4:g256", "int4:g256"),
        ("int4:rotated", "int4:g32:rotated"),
        ("int4:rotated:g128", "int4:g128:rotated"),
        ("int8:two-terms:g64", "int8:g64:two-terms"),
        ("int8:weight-only", "int8:weight-only"),
        ("int8:g128:weight-only", "int8:g128:weight-only"),
        ("sparse24:int8", "sparse24:int8"),
        ("sparse24:int4", "sparse24:int4:g32"),
        ("sparse24:int4:g128", "sparse24:int4:g128"),
        ("lowrank:int8:r64", "lowrank:int8:r64"),
        ("lowrank:int4:r192:g64", "lowrank:int4:g64:r192"),
        ("lowrank:none", "lowrank:none"),
    ],
)
def test_a_scheme_is_written_in_one_way(text: str, canonical: str) -> None:
    assert str(parse_scheme_spec(text)) == canonical
    assert parse_scheme_spec(canonical) == parse_scheme_spec(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "int3",
            "must be one of none, int8, int4, nf4, codebook4, sparse24:int8, sparse24:int4, "
            "lowrank:none, lowrank:int8, lowrank:int4, got 'int3'",
        ),
        ("sparse24", "got 'sparse24'"),
        (
            "sparse24:int8:g32",
            "'g32' in 'sparse24:int8:g32' is not known; after sparse24:int8 there may be nothing",
        ),
        ("lowrank:int8:r0", "'r0' in .* after lowrank:int8 there may be a rank like r64"),
        ("lowrank:int8:r8:r16", "has two words for one thing"),
        ("int8:r8", "'r8' in 'int8:r8' is not known"),
        ("sparse24:int4:g96", "after sparse24:int4 there may be g32, g64, g128"),
        ("", "got ''"),
        ("int4:g48", "'g48' in 'int4:g48' is not known; after int4 there may be g32, g64, g128, g0, rotated"),
        ("int8:g0", "after int8 there may be g32"),
        ("int8:rotated", "'rotated' in 'int8:rotated' is not known"),
        ("int4:rotated:rotated", "two words for one thing"),
        ("nf4:g64", "after nf4 there may be nothing"),
        ("int4:token", "'token' in"),
        ("int8:token:weight-only", "two words for one thing"),
        ("int4:g32:g64", "two words for one thing"),
        ("int4,lm_head", "'lm_head' in 'int4,lm_head' is not of the form pattern=scheme"),
        ("int4,=int8", "pattern=scheme"),
        ("int4,a=int5", "got 'int5'"),
    ],
)
def test_what_is_not_understood_is_refused_with_what_would_be(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_quant_spec(text)


def test_modules_of_one_product_need_one_scheme() -> None:
    assert parse_quant_spec("int4").of_product(QKV) == [SchemeSpec("int4", 32)] * 3
    with pytest.raises(
        ConfigError, match=r"q_proj int8, .*k_proj int4:g32, .*v_proj int4:g32: .*self_attn\.\*"
    ):
        parse_quant_spec("int4,*.q_proj=int8").of_product(QKV)


def test_products_in_groups_may_differ() -> None:
    spec = parse_quant_spec("q4_k,*.v_proj=q6_k,*.k_proj=int8:g32")
    assert [str(words) for words in spec.of_product(QKV)] == ["q4_k", "int8:g32", "q6_k"]
    for other in ("int8", "int8:g32:token", "int8:g32:weight-only", "none", "int4"):
        with pytest.raises(ConfigError, match="multiplied as one matrix"):
            parse_quant_spec(f"q4_k,*.v_proj={other}").of_product(QKV)


def test_a_pattern_that_names_no_module_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no module matches '\*\.w1'; there are lm_head, model.layers.0"):
        parse_quant_spec("int4,*.w1=int8").check([*QKV, "lm_head"])
    with pytest.raises(ConfigError, match=r"model\.embed_tokens cannot be int4:g32; a table is none or int8"):
        parse_quant_spec("none,*=int4").check(QKV)


def test_exactness_is_a_property_of_all_products() -> None:
    exact = {
        text: parse_quant_spec(text).is_exact for text in ("int8", "int8:g32:token", "int8,lm_head=none")
    }
    assert exact == {"int8": True, "int8:g32:token": True, "int8,lm_head=none": False}
    assert not parse_quant_spec("int8:weight-only").is_exact
    assert parse_quant_spec("none,lm_head=nf4").is_quantized
    assert not parse_quant_spec("none").is_quantized


def test_what_a_checkpoint_stores_is_covered_by_exceptions_from_what_is_most_common() -> None:
    modules = ["model.embed_tokens", *QKV, DOWN.format(0), DOWN.format(1), "lm_head"]
    stored = dict.fromkeys(QKV, SchemeSpec("int4", 64)) | {DOWN.format(0): SchemeSpec("int8")}
    covering = QuantSpec.covering(stored, modules)
    assert str(covering) == f"int4:g64,{DOWN.format(0)}=int8,{DOWN.format(1)}=none"
    assert str(covering.of("lm_head")) == "int8:g32"
