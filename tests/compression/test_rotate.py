"""Rotation in blocks, ranges by squared error, and compensation, joined: made, served, and worth it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.compression.__main__ import main
from engine.compression.gptq import gptq, output_errors
from engine.compression.layer_quantizer import quantize_weight, round_directly
from engine.compression.recipe import Recipe
from engine.kernels.operands import SparseInt8Format
from engine.kernels.rotation import rotate
from engine.loading.checkpoint import Checkpoint, open_checkpoint
from engine.quant import cpu_formats
from engine.quant.int4 import Int4
from engine.quant.rotated import Rotated
from engine.quant.weight import RotatedWeight, to_float
from engine.quant_spec import parse_scheme_spec
from engine.tokenizer.files import byte_tokenizer
from tests.helpers.paged import make_runner, make_sequences, run_chunks
from tests.helpers.tiny import TINY_CONFIGS, load_reference, reference_logits, write_checkpoint
from tests.helpers.trained import Bench

CHUNKS = [[[26, 1], [7, 12, 1], [2, 1]], [[27], [20], [3]]]
"""The same sequences, in one way and another."""

JOINED = "rotate + mse + gptq + int4:g64"

WIDTH = 224
"""Of the MLPs: blocks of 128, 64 and 32."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {}
    for family in ("llama", "gemma3"):
        config = deepcopy(TINY_CONFIGS[family])
        layers = {"layer_types": config.layer_types[-2:]} if family == "gemma3" else {}
        config.update({"num_hidden_layers": 2, "intermediate_size": WIDTH, **layers})
        paths[family] = tmp_path_factory.mktemp("rotate") / family
        write_checkpoint(paths[family], config)
        byte_tokenizer().save(str(paths[family] / "tokenizer.json"))
    return paths


def compress(source: Path, out: Path, steps: str) -> Checkpoint:
    """By the command."""
    options = ["--windows", "4", "--length", "48", "--out", str(out)]
    assert main([str(source), "--steps", steps, *options]) == 0
    return open_checkpoint(out)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_rotated_checkpoint_is_made_and_served(
    sources: dict[str, Path], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = compress(sources[family], tmp_path / "out", JOINED)
    source = open_checkpoint(sources[family])
    assert written.config["quantization_config"]["specification"].startswith("int4:g64:rotated,")
    down = "model.layers.1.mlp.down_proj.weight"
    stored = written.tensor(down)
    assert isinstance(stored, RotatedWeight)
    floats = to_float(source.tensor(down)).float()
    # Both W, and W H as it is stored, are that far off, and no other way around.
    for actual, expected in ((to_float(stored), floats), (stored.grid.dequantize(), rotate(floats))):
        assert (actual - expected).norm() < 0.2 * expected.norm()
    assert (stored.grid.dequantize() - floats).norm() > 0.5 * floats.norm()

    # With activations as fine as the format goes, logits are those of the decoded numbers in floats.
    monkeypatch.setattr(cpu_formats, "CPU_ACTIVATIONS", SparseInt8Format(spread=0.0))
    ends = "lm_head=none,model.embed_tokens=none"
    runner = make_runner(tmp_path / "out", quant=f"int4:g64:rotated,{ends}", kv_cache_dtype="float32")
    reference = load_reference(sources[family])
    decoded = {name: to_float(written.tensor(name)).float() for name in source.names()}
    reference.load_state_dict(decoded, strict=False)
    found = [run_chunks(runner, make_sequences(320, CHUNKS[0]), chunks) for chunks in CHUNKS]
    for sequence, computed, otherwise in zip(make_sequences(320, CHUNKS[0]), *found, strict=True):
        expected = reference_logits(reference, sequence)
        for position, logits in computed.items():
            assert (logits - expected[position]).norm() < 0.005 * expected[position].norm()
            if position in otherwise:
                assert torch.equal(logits, otherwise[position])


def test_what_stands_out_no_longer_coarsens_its_group() -> None:
    """Of weights that are rounded while they are loaded, beside the same storage without a rotation."""
    weight, x = torch.randn(48, WIDTH), torch.randn(30, WIDTH)
    weight[:, ::45] *= 12
    x[:, 7] *= 30
    exact, errors = x.double() @ weight.double().T, {}
    for scheme in (Int4(64), Rotated(Int4(64))):
        product = scheme.bind(scheme.quantize(weight), None)
        errors[scheme.name] = float((product(x).double() - exact).norm() / exact.norm())  # type: ignore[operator]
    assert errors["int4g64-rotated"] < 0.5 * errors["int4g64"]


def random_layer(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with heavy tails, and the second moment of correlated inputs of which a few are large."""
    weight = torch.randn(outputs, inputs) ** 3
    x = torch.randn(1000, inputs) @ (torch.eye(inputs) + torch.randn(inputs, inputs) / inputs**0.5)
    x[:, ::37] *= 20
    return weight, (x.t() @ x / len(x)).double()


def test_squared_errors_of_columns_count_by_their_inputs() -> None:
    weight, moment = random_layer(20, 192)
    words = parse_scheme_spec("int4:g64")
    importance = moment.diagonal()
    errors = [
        ((round_directly(weight, words, "mse", False, weights).dequantize() - weight).square() * importance)
        .sum()
        .item()
        for weights in (importance, None)
    ]
    assert errors[0] < 0.9 * errors[1]


def test_compensation_keeps_the_ranges_that_were_found() -> None:
    weight, moment = random_layer(20, 192)
    words = parse_scheme_spec("int4:g64")
    nearest = round_directly(weight, words, "mse", False, moment.diagonal())
    joined, plain = (
        quantize_weight(weight, moment, words, Recipe.parse("int4:g64", algorithm))[0]
        for algorithm in ("mse+gptq", "gptq")
    )
    assert torch.equal(joined.scale, nearest.scale)  # type: ignore[union-attr, arg-type]
    errors = {
        name: float(output_errors(rounded.dequantize() - weight, moment).sum())
        for name, rounded in {"nearest": nearest, "joined": joined, "plain": plain}.items()
    }
    assert errors["joined"] < 0.9 * errors["nearest"]
    assert errors["joined"] < 0.9 * errors["plain"]


def test_codes_of_a_fixed_grid_are_those_of_the_same_grid_found() -> None:
    weight, moment = random_layer(10, 128)
    start = round_directly(weight, parse_scheme_spec("int4:g64"), None, False)
    groups = iter(range(2))

    def find(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        group = next(groups)
        assert start.minimum is not None
        return start.scale[:, group], start.minimum[:, group]

    found = gptq(weight, moment, find, 64, 16, by_activation=True)
    fixed = gptq(
        weight, moment, replace(start, codes=torch.zeros_like(start.codes)), 64, 16, by_activation=True
    )
    assert torch.equal(found.codes, fixed.codes)
    assert torch.equal(found.scale, fixed.scale)


def test_joined_they_lose_at_most_half_of_what_rounding_does(tmp_path: Path) -> None:
    """At equal bytes; the means of three models that were trained as floats. It is less than a tenth."""
    variants = [(f"int4:g{size}", how) for size in (32, 128) for how in ("rtn", "rotate+mse+gptq")]
    lost = dict.fromkeys(variants, 0.0)
    for seed in range(3):
        (tmp_path / str(seed)).mkdir()
        bench = Bench(tmp_path / str(seed), hidden=128, steps=25, seed=seed)
        for variant in variants:
            lost[variant] += bench.divergence(bench.compressed(*variant)) / 3
    for scheme in ("int4:g32", "int4:g128"):
        assert lost[scheme, "rotate+mse+gptq"] < 0.2 * lost[scheme, "rtn"]
