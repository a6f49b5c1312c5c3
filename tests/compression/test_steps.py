"""The language of --steps: what is read, in which order, and what is refused with which words."""

from __future__ import annotations

import pytest

from engine.compression.__main__ import main
from engine.compression.recipe import Recipe
from engine.compression.steps import ORDER, DropChannels, DropLayers, LowRank, Plain, Prune, parse_steps
from engine.errors import ConfigError


def test_steps_are_read_with_their_arguments_and_the_scheme_with_its_rules() -> None:
    recipe = Recipe.parse_steps(
        "prune=2of4,sparsegpt+ gptq + int4:g64,*.down_proj=int8:g32,lm_head=int8", None, True
    )
    assert recipe.steps == (Prune(0.5, True, "sparsegpt"), Plain("gptq"))
    assert str(recipe.quant_spec.of("model.layers.0.mlp.down_proj")) == "int8:g32"
    assert str(recipe.quant_spec.of("lm_head")) == "int8"
    assert recipe.algorithm == "prune=2of4,sparsegpt+gptq"
    assert Recipe.parse_steps("prune=0.25,magnitude + none").pruning == Prune(0.25, False, "magnitude")


@pytest.mark.parametrize(
    ("steps", "scheme", "algorithm", "group"),
    [
        ("int8", "int8", "rtn", None),
        ("rotate + mse + gptq + int4:g64", "int4:g64", "rotate+mse+gptq", None),
        ("hadamard + gptq + tune + int4", "int4", "hadamard+gptq+tune", 128),
        ("prune=0.5,wanda + int4,lm_head=int8", "int4,lm_head=int8", "prune=0.5,wanda", None),
        ("awq + int4:g64", "int4:g64", "awq", None),
    ],
)
def test_a_scheme_and_an_algorithm_are_shorthand(
    steps: str, scheme: str, algorithm: str, group: int | None
) -> None:
    assert Recipe.parse_steps(steps, group) == Recipe.parse(scheme, algorithm, group)


def test_what_is_written_of_steps_is_read_as_the_same() -> None:
    steps = (
        DropLayers(4),
        DropChannels(0.2),
        Plain("hadamard"),
        Prune(0.3, False, "wanda"),
        LowRank("budget", 0.8, True),
        Plain("awq"),
        Plain("gptq"),
        Plain("tune"),
    )
    assert parse_steps("+".join(map(str, steps))) == steps


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("prune=0.5,wanda + gptq", "'prune=0.5,wanda [+] gptq' must end with the scheme .* gptq [+] int8"),
        ("prune=0.5 + int8", "prune=0.5: must be a share .* and one of magnitude, wanda, sparsegpt"),
        ("prune=1.5,wanda + int8", "prune=1.5,wanda: must be a share between 0 and 1"),
        ("prune=nan,wanda + int8", "prune=nan,wanda: must be a share"),
        ("prune=1of4,wanda + int8", "prune=1of4,wanda: must be a share .* or 2of4"),
        ("prune=2of4,wanda,gptq + int8", "prune=2of4,wanda,gptq: must be"),
        ("prune + int8", "prune=: must be a share"),
        ("gptq=3 + int4", "'gptq=3': gptq has no arguments; write gptq"),
        ("tucker=3 + int8", "'tucker=3' is not known; steps are, in this order, layers"),
        ("lowrank=energy0.95 + lowrank:int8", "lowrank=energy0.95: must be energy or budget .* svd, svd-llm"),
        ("lowrank=0.8,svd + lowrank:int8", "lowrank=0.8,svd: must be energy or budget"),
        ("lowrank=budget1.2,svd + lowrank:int8", "lowrank=budget1.2,svd: must be"),
        ("lowrank=budget0.8,svd + int8", "makes factors, which no module's scheme stores; .* lowrank:int8"),
        ("lowrank:int8", "lowrank:int8 stores factors, which the step lowrank makes: lowrank=budget0.8"),
        ("lowrank=budget0.8,svd + lowrank:int8:r8", "ranks are chosen by lowrank=budget0.8,svd; leave r8 out"),
        ("lowrank=budget0.8,svd + lowrank:int8,lm_head=lowrank:int8", "lm_head does not become factors"),
        ("prune=0.5,wanda + lowrank=budget0.8,svd + lowrank:int8", "fills the zeros of prune=0.5,wanda"),
        ("gptq + prune=2of4,wanda + int4", "in an order that cannot be; write prune=2of4,wanda [+] gptq"),
        ("prune=0.5,wanda + prune=2of4,wanda + int8", "prune=0.5,wanda and prune=2of4,wanda do the same"),
        ("prune=0.5,wanda + codebook4", "codebook4 does not store zeros exactly; take one of none, int8"),
        ("prune=0.5,wanda + int8,*.0.*=codebook4", "codebook4 does not store zeros exactly"),
        ("prune=0.5,wanda + tune + int4", "tune moves int4's minimums .* add --symmetric, or leave tune out"),
        ("rtn + none", "none with rtn changes nothing; .* hadamard, prune, lowrank or smoothquant"),
        ("layers=0 + int8", "layers=0: must say how many are left out, layers=4"),
        ("layers=2.5 + int8", "layers=2.5: must say how many"),
        ("channels=20,1 + int8", "channels=20,1: must be a share between 0 and 1, channels=0.2"),
        ("channels=1 + int8", "channels=1: must be a share"),
        ("mse + rotate + gptq + int4", "in an order that cannot be; write rotate [+] mse [+] gptq"),
        ("rotate + gptq + mse + int4", "in an order that cannot be; write rotate [+] mse [+] gptq"),
        ("mse + clip + int4", "mse and clip do the same"),
        ("awq + rotate + int4", "awq and rotate do the same"),
        ("awq + int4:rotated", "awq and rotate do the same to int4:rotated"),
        ("rotate + int8", "rotate is for int4, the scheme has int8, which takes"),
        ("rotate=128 + int4", "rotate has no arguments"),
        ("prune=0.5,wanda + rotate + int4", "a rotation leaves no zeros; leave it out, or rotate"),
        ("prune=0.5,wanda + int4:rotated", "a rotation leaves no zeros"),
        ("channels=0.2 + layers=3 + int8", "cannot be; write layers=3 [+] channels=0.2"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_its_word(steps: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(steps|scheme): .*{message}"):
        Recipe.parse_steps(steps)


def test_rotation_is_kept_with_the_schemes_that_can_be_rotated() -> None:
    recipe = Recipe.parse_steps("rotate + mse + gptq + int4:g64,*.down_proj=int8,*.o_proj=int4")
    stored = {
        module: str(recipe.quant_spec.of(f"model.layers.0.{module}"))
        for module in ("mlp.up_proj", "mlp.down_proj", "self_attn.o_proj")
    }
    assert stored == {
        "mlp.up_proj": "int4:g64:rotated",
        "mlp.down_proj": "int8",
        "self_attn.o_proj": "int4:g32:rotated",
    }
    assert str(recipe.quant_spec.of("lm_head")) == "none"
    assert (
        Recipe.parse_steps("mse + gptq + int4:rotated").quant_spec
        == Recipe.parse("int4", "rotate").quant_spec
    )


@pytest.mark.parametrize("option", ["--scheme", "--algorithm"])
def test_both_forms_at_once_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere", "--steps", "int8", option, "gptq", "--out", "out"]) == 2
    assert (
        "error: steps: say all that --scheme and --algorithm do; leave these out" in capsys.readouterr().err
    )


def test_the_help_has_every_step_and_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert f"{ORDER} + SCHEME" in text
    assert (
        ORDER
        == "layers + channels + hadamard + prune + lowrank + smoothquant|awq|rotate + percentile|mse|kl|clip + "
        "rtn|gptq + tune"
    )
    for word in ("\n  prune=SHARE,HOW ", "\n  gptq ", "\n  tune "):
        assert word in text
