"""Leaving out layers and channels: chosen as computed by hand, loaded by transformers, and gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.compression import quantize
from engine.compression.calibration import CalibratedLayer
from engine.compression.channels import block_importance
from engine.compression.layer_quantizer import QuantizedLayer, quantize_layer
from engine.compression.layers import block_influence, least_influential, measure_influences
from engine.compression.quantize import quantize_checkpoint
from engine.compression.recipe import Recipe
from engine.errors import ConfigError
from engine.loading.checkpoint import Checkpoint, open_checkpoint
from engine.models.config import ModelConfig
from engine.quant.weight import to_float
from tests.compression.test_quantize import logits_of, make_runner, make_text
from tests.helpers.paged import run_chunks
from tests.helpers.tiny import TINY_CONFIGS, load_reference, reference_logits, write_checkpoint

FAMILIES = {
    "llama-biases": {"num_hidden_layers": 4, "intermediate_size": 192},
    "smollm2": {"num_hidden_layers": 4, "intermediate_size": 200, "attention_bias": False},
    "qwen2-sliding": {"num_hidden_layers": 4, "intermediate_size": 192, "max_window_layers": 2},
    "qwen3": {"num_hidden_layers": 4, "intermediate_size": 192},
    "gemma3": {"intermediate_size": 192},
    "mistral": {"num_hidden_layers": 4, "intermediate_size": 192},
}
TOKEN_IDS = list(range(3, 43))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints by family, written when they are asked for."""
    directory = tmp_path_factory.mktemp("structure")

    def source(family: str) -> Path:
        if not (directory / family).exists():
            config = deepcopy(TINY_CONFIGS[family])
            config.update(FAMILIES[family])
            if family == "qwen2-sliding":
                config.layer_types = ["full_attention"] * 2 + ["sliding_attention"] * 2
            if family == "qwen3":
                config.layer_types = ["full_attention"] * 4
            write_checkpoint(directory / family, config)
        return directory / family

    return source


def make(source: Path, directory: Path, steps: str) -> Checkpoint:
    recipe = Recipe.parse_steps(steps)
    quantize_checkpoint(open_checkpoint(source), recipe, make_text(source), directory, lambda line: None)
    return open_checkpoint(directory)


def structure_of(directory: Path) -> dict[str, dict[str, list[object]]]:
    found: dict[str, dict[str, list[object]]] = json.loads((directory / "quantization.json").read_text())[
        "structure"
    ]
    return found


def check_logits(directory: Path) -> None:
    """Transformers loads the directory, and has the engine's logits."""
    expected = reference_logits(load_reference(directory), TOKEN_IDS)
    runner = make_runner(directory, "none")
    actual = run_chunks(runner, [TOKEN_IDS], [[len(TOKEN_IDS)]])[0][len(TOKEN_IDS) - 1]
    torch.testing.assert_close(actual, expected[-1], rtol=1e-4, atol=1e-4)


def test_influence_is_the_turn_of_the_hidden_states() -> None:
    before = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    after = torch.tensor([[5.0, 0.0], [1.0, 0.0], [-1.0, -1.0]])
    # Cosines of 1, 0 and -1.
    assert block_influence(before, after) == pytest.approx(1.0)
    assert block_influence(before, 7 * before) == pytest.approx(0.0, abs=1e-6)
    assert block_influence(before[:1], torch.tensor([[1.0, 1.0]])) == pytest.approx(1 - 0.5**0.5)
    assert least_influential([0.3, 0.1, 0.2, 0.1, 0.05], 3) == [1, 3, 4]


def test_influences_are_those_of_transformers_hidden_states(sources: Callable[[str], Path]) -> None:
    path = sources("llama-biases")
    checkpoint = open_checkpoint(path)
    token_ids = make_text(path).token_ids
    found = measure_influences(checkpoint, ModelConfig.from_dict(checkpoint.config), token_ids)
    layers, model = [], load_reference(path)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: layers.append((args[0], output)))
    with torch.no_grad():
        model(token_ids)
    expected = [1 - float((x * y).sum(-1).div(x.norm(dim=-1) * y.norm(dim=-1)).mean()) for x, y in layers]
    assert found == pytest.approx(expected, rel=1e-4)


def test_importance_is_the_error_without_the_block() -> None:
    weight, x = torch.randn(5, 12, dtype=torch.float64), torch.randn(40, 12, dtype=torch.float64)
    moment = x.t() @ x / 40
    for num_blocks in (12, 3):
        size = 12 // num_blocks
        expected = []
        for block in range(num_blocks):
            cut = weight.clone()
            cut[:, block * size : (block + 1) * size] = 0
            expected.append(float((x @ (weight - cut).t()).square().sum(dim=1).mean()))
        torch.testing.assert_close(block_importance(weight, moment, num_blocks).tolist(), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "steps", ["layers=2 + none", "channels=0.36 + none", "layers=1 + channels=0.5 + none"]
)
def test_transformers_has_the_same_logits(
    sources: Callable[[str], Path], family: str, steps: str, tmp_path: Path
) -> None:
    path = sources(family)
    written = make(path, tmp_path / "out", steps)
    before, after = (ModelConfig.from_dict(open_checkpoint(each).config) for each in (path, tmp_path / "out"))
    dropped = structure_of(tmp_path / "out").get("layers", {"dropped": []})["dropped"]
    kept = [layer for layer in range(before.num_layers) if layer not in dropped]
    assert after.num_layers == len(kept)
    assert after.sliding_windows == tuple(before.sliding_windows[layer] for layer in kept)
    assert after.head_dim == before.head_dim
    if "channels" in steps:
        assert after.intermediate_size == 128 < before.intermediate_size
    assert after.num_heads * before.num_kv_heads == after.num_kv_heads * before.num_heads
    assert written.config["num_key_value_heads"] == after.num_kv_heads
    check_logits(tmp_path / "out")


def test_the_layers_that_turn_least_go(sources: Callable[[str], Path], tmp_path: Path) -> None:
    """A layer that adds next to nothing is found, and the others are the source's, bit for bit."""
    model = AutoModelForCausalLM.from_pretrained(sources("llama-biases"), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.model.layers[2].named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter *= 1e-4
    model.half().save_pretrained(tmp_path / "source")
    written = make(tmp_path / "source", tmp_path / "out", "layers=1 + none")
    structure = structure_of(tmp_path / "out")["layers"]
    assert structure["dropped"] == [2]
    assert len(structure["influences"]) == 4
    source = open_checkpoint(tmp_path / "source")
    for old, new in {0: 0, 1: 1, 3: 2}.items():
        name = "mlp.gate_proj.weight"
        assert torch.equal(
            to_float(written.tensor(f"model.layers.{new}.{name}")),
            to_float(source.tensor(f"model.layers.{old}.{name}")),
        )


def test_the_channels_and_heads_that_add_nothing_go(sources: Callable[[str], Path], tmp_path: Path) -> None:
    """Where what is left out adds nothing, no logit changes."""
    model = AutoModelForCausalLM.from_pretrained(sources("smollm2"), dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    silent = []
    with torch.no_grad():
        for layer in model.model.layers:
            channels = torch.randperm(200, generator=generator)[: 200 - 128].sort().values
            layer.mlp.down_proj.weight[:, channels] *= 1e-5
            head = int(torch.randint(3, (), generator=generator))
            layer.self_attn.o_proj.weight[:, head * 24 : (head + 1) * 24] *= 1e-5
            silent.append((set(channels.tolist()), head))
    model.save_pretrained(tmp_path / "source")
    written = make(tmp_path / "source", tmp_path / "out", "channels=0.36 + none")
    assert (written.config["intermediate_size"], written.config["num_key_value_heads"]) == (128, 2)
    assert (written.config["num_attention_heads"], written.config["head_dim"]) == (6, 8)
    structure = structure_of(tmp_path / "out")["channels"]
    for bits, heads, (channels, head) in zip(structure["mlp"], structure["kv_heads"], silent, strict=True):
        assert {channel for channel in range(200) if not int(str(bits), 16) >> channel & 1} == channels
        assert heads == [each for each in range(3) if each != head]
    expected = reference_logits(load_reference(tmp_path / "source"), TOKEN_IDS)
    actual = reference_logits(load_reference(tmp_path / "out"), TOKEN_IDS)
    # Stored as fp16.
    assert (actual - expected).norm() < 2e-3 * expected.norm()


def test_the_other_steps_go_on_with_what_is_left(sources: Callable[[str], Path], tmp_path: Path) -> None:
    steps = (
        "layers=1 + channels=0.36 + hadamard + prune=2of4,sparsegpt + gptq + int4:g32,model.layers.2.*=int8"
    )
    written = make(sources("qwen3"), tmp_path / "out", steps)
    assert written.config["num_hidden_layers"] == 3
    runner = make_runner(tmp_path / "out")
    served, plain = logits_of(runner), logits_of(make_runner(tmp_path / "out", "none"))
    assert (served - plain).std() < 0.15 * plain.std()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("layers=4 + none", "layers=4: the model has 4 layers; leave out fewer"),
        (
            "channels=0.1 + none",
            "channels=0.1: leaves out nothing of 192 channels, .* 64 stays, and 2 KV heads",
        ),
        ("layers=2 + int8,model.layers.3.*=none", "no module matches 'model.layers.3"),
    ],
)
def test_what_cannot_be_left_out_is_refused(
    sources: Callable[[str], Path], steps: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(sources("llama-biases"), tmp_path / "out", steps)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "steps", ["layers=1 + channels=0.36 + prune=0.5,sparsegpt + none", "layers=2 + prune=2of4,wanda + int8"]
)
def test_an_interrupted_run_goes_on_with_its_plan(
    sources: Callable[[str], Path], steps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sources("llama-biases")
    make(path, tmp_path / "whole", steps)

    def stop_at_the_second(layer: CalibratedLayer, recipe: Recipe) -> QuantizedLayer:
        if layer.index == 1:
            raise KeyboardInterrupt
        return quantize_layer(layer, recipe)

    with monkeypatch.context() as patch:
        patch.setattr(quantize, "quantize_layer", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            make(path, tmp_path / "parts", steps)
    with monkeypatch.context() as patch:
        for name in ("measure_influences", "choose_kept"):
            patch.delattr(f"engine.compression.structure.{name}")
        make(path, tmp_path / "parts", steps)
    files = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "parts").iterdir()}
