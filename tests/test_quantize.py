"""Making quantized checkpoints: what is written is served, and every algorithm does what it is for."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from engine import quantize
from engine.calibration import CalibratedLayer, Calibration, CalibrationText, default_text
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kernels.nibbles import unpack_nibbles
from engine.loading.checkpoint import Checkpoint, StoredGrid, open_checkpoint, stored_grid
from engine.models.config import ModelConfig
from engine.quant import plan_quantization
from engine.quant.gptq import output_errors
from engine.quant.rounding import round_to_nearest
from engine.quant.weight import GridWeight, to_float
from engine.quantize import ROLES, Algorithm, Recipe, quantize_checkpoint, quantize_layer
from engine.runner import ModelRunner
from tests.paged import make_sequences, run_chunks
from tests.tiny import TINY_CONFIGS, write_checkpoint

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {}
    for family in ("llama", "gemma3"):
        config = deepcopy(TINY_CONFIGS[family])
        paths[family] = tmp_path_factory.mktemp("quantize") / family
        write_checkpoint(paths[family], config)
    return paths


def make_text(path: Path, seed: int = 0) -> CalibrationText:
    vocabulary = open_checkpoint(path).config["vocab_size"]
    token_ids = torch.randint(vocabulary, (6, 48), generator=torch.Generator().manual_seed(seed))
    return CalibrationText(token_ids, f"random {seed}")


def make(path: Path, directory: Path, recipe: Recipe) -> Checkpoint:
    quantize_checkpoint(open_checkpoint(path), recipe, make_text(path), directory, lambda line: None)
    return open_checkpoint(directory)


def make_runner(path: Path, quant: str = "auto") -> ModelRunner:
    config = EngineConfig.from_options(model=str(path), quant=quant, device="cpu", kv_cache_memory="4MiB")
    return ModelRunner(config, open_checkpoint(path))


def logits_of(runner: ModelRunner) -> torch.Tensor:
    chunks = [[12, 1, 1], [5, 3]]
    rows = run_chunks(runner, make_sequences(runner.model_config.vocab_size, chunks), chunks)
    return torch.stack([row for by_position in rows for row in by_position.values()])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Recipe(4, 32), StoredGrid("int4", 32)),
        (Recipe(4, 64, symmetric=True, algorithm="mse"), StoredGrid("int4", 64)),
        (Recipe(4, 0, algorithm="gptq"), StoredGrid("int4", 0)),
        (Recipe(4, 32, algorithm="awq"), StoredGrid("int4", 32)),
        (Recipe(8, 0, symmetric=True), StoredGrid("int8", 0)),
    ],
    ids=str,
)
def test_what_is_written_is_served_on_its_own_grid(
    checkpoints: dict[str, Path], family: str, recipe: Recipe, expected: StoredGrid, tmp_path: Path
) -> None:
    written = make(checkpoints[family], tmp_path / "out", recipe)
    assert stored_grid(written) == expected
    runner = make_runner(tmp_path / "out")
    assert (runner.config.quant, runner.config.group_size if recipe.bits == 4 else 0) == (
        expected.quant,
        expected.group_size,
    )
    served, plain = logits_of(runner), logits_of(make_runner(tmp_path / "out", "none"))
    # On one side only, weights are expanded to int8 codes, and activations, embeddings and the cache are int8.
    assert (served - plain).std() < 0.1 * plain.std()
    stored = written.tensor(DOWN)
    assert isinstance(stored, GridWeight)
    scheme = plan_quantization(expected.quant, torch.float32, expected.group_size).linear
    kept = scheme.quantize(stored)
    assert torch.equal(kept["weight"] if recipe.bits == 8 else unpack_nibbles(kept["codes"]), stored.codes)
    other = "int8" if expected.quant == "int4" else "int4"
    with pytest.raises(ConfigError, match=f"are {expected.quant} already; leave --quant out"):
        make_runner(tmp_path / "out", other)


def test_round_to_nearest_is_what_is_written(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    original = to_float(open_checkpoint(checkpoints["llama"]).tensor(DOWN)).float()
    weight = make(checkpoints["llama"], tmp_path / "out", Recipe(4, 32)).tensor(DOWN)
    assert isinstance(weight, GridWeight)
    assert weight.minimum is not None
    expected = round_to_nearest(original, 4, 32, symmetric=False)
    assert expected.minimum is not None
    assert torch.equal(weight.codes, expected.codes)
    assert torch.equal(weight.scale, expected.scale)
    # The file holds whole zero-points; ours are their products with the scale in fp16.
    torch.testing.assert_close(weight.minimum.half(), expected.minimum, rtol=1e-3, atol=0.0)


def test_groups_that_do_not_fill_the_rows_go_into_our_own_layout(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    written = make(checkpoints["llama"], tmp_path / "out", Recipe(4, 128))
    assert written.config["quantization_config"] == {
        "quant_method": "llm-engine",
        "bits": 4,
        "group_size": 128,
    }
    original = to_float(open_checkpoint(checkpoints["llama"]).tensor(DOWN)).float()
    assert original.shape[1] % 128
    weight = written.tensor(DOWN)
    expected = round_to_nearest(original, 4, 128, symmetric=False)
    assert isinstance(weight, GridWeight)
    assert torch.equal(weight.dequantize(), expected.dequantize())
    assert logits_of(make_runner(tmp_path / "out")).isfinite().all()


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    checkpoints: dict[str, Path], algorithm: Algorithm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(4, 32, algorithm=algorithm)
    make(checkpoints["llama"], tmp_path / "whole", recipe)

    def stop_at_the_second(layer: CalibratedLayer, recipe: Recipe) -> quantize.Quantized:
        if layer.index == 1:
            raise KeyboardInterrupt
        return quantize_layer(layer, recipe)

    with monkeypatch.context() as patch:
        patch.setattr(quantize, "quantize_layer", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            make(checkpoints["llama"], tmp_path / "parts", recipe)
    assert not (tmp_path / "parts" / "config.json").exists()
    make(checkpoints["llama"], tmp_path / "parts", recipe)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "parts" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_directory_of_something_else_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    make(checkpoints["llama"], tmp_path / "out", Recipe(4, 32))
    with pytest.raises(ConfigError, match="of another model, recipe or calibration"):
        make(checkpoints["llama"], tmp_path / "out", Recipe(4, 64))
    with pytest.raises(ConfigError, match="is quantized already"):
        make(tmp_path / "out", tmp_path / "again", Recipe(4, 64))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="is not empty"):
        make(checkpoints["llama"], tmp_path / "notes", Recipe(4, 32))


def test_the_record_says_how_it_was_made(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    make(checkpoints["llama"], tmp_path / "out", Recipe(4, 32, algorithm="gptq"))
    record = json.loads((tmp_path / "out" / "quantization.json").read_text())
    assert record["recipe"] == {"bits": 4, "group_size": 32, "symmetric": False, "algorithm": "gptq"}
    assert record["calibration"] == {"windows": [6, 48], "digest": "random 0"}
    # Four bits: some 20 dB.
    assert (
        len(record["signal_to_noise_db"]) == 7 * open_checkpoint(tmp_path / "out").config["num_hidden_layers"]
    )
    assert all(10 < decibels < 60 for decibels in record["signal_to_noise_db"].values())


@pytest.mark.parametrize("recipe", [{"group_size": 48}, {"bits": 8}, {"bits": 8, "algorithm": "gptq"}])
def test_what_no_scheme_serves_is_refused(recipe: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Recipe(**recipe)  # type: ignore[arg-type]


def calibrated(path: Path) -> CalibratedLayer:
    """A layer whose inputs have a few large channels, as those of trained models do."""
    checkpoint = open_checkpoint(path)
    config = ModelConfig.from_dict(checkpoint.config)
    layer = next(Calibration(checkpoint, config, make_text(path).token_ids).layers(set()))
    with torch.no_grad():
        for norm in layer.norms.values():
            norm.weight[::9] *= 12
    for statistics in layer.statistics.values():
        statistics.products.zero_()
        statistics.magnitudes.zero_()
        statistics.num_tokens = 0
    generator = torch.Generator().manual_seed(1)
    for role in ROLES:
        size = layer.linears[role].in_features
        x = torch.randn(600, size // 4, generator=generator) @ torch.randn(
            size // 4, size, generator=generator
        )
        x[:, ::9] *= 12
        layer.statistics[role].update(x + 0.3 * torch.randn(600, size, generator=generator))
    return layer


def output_error(path: Path, algorithm: Algorithm) -> float:
    """Of the weights alone, over all roles; in the units of each role's float output."""
    layer = calibrated(path)
    moments = {role: layer.statistics[role].second_moment for role in ROLES}
    before = {role: [w.clone() for w in layer.weights(role).values()] for role in ROLES}
    norms = {role: norm.weight.clone() for role, norm in layer.norms.items()}
    quantize_layer(layer, Recipe(4, 32, algorithm=algorithm))
    total = 0.0
    for role in ("qkv", "output"):
        # What a scale took out of the norm is put back, to compare with the float weight.
        ratio = layer.norms[role].weight / norms[role] if role in norms else torch.ones(1)
        for old, new in zip(before[role], layer.weights(role).values(), strict=True):
            noise = output_errors(new * ratio - old, moments[role]).sum()
            total += float(noise / output_errors(old, moments[role]).sum())
    return total


def test_calibrated_algorithms_beat_rounding(checkpoints: dict[str, Path]) -> None:
    errors = {
        algorithm: output_error(checkpoints["llama"], algorithm) for algorithm in ("rtn", "gptq", "awq")
    }
    assert errors["gptq"] < 0.6 * errors["rtn"]
    assert errors["awq"] < 0.9 * errors["rtn"]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_folded_scales_change_nothing_by_themselves(checkpoints: dict[str, Path], family: str) -> None:
    layer = calibrated(checkpoints[family])
    layer.stop_recording()
    attention, mlp = layer.module.attention, layer.module.mlp
    x = torch.randn(5, attention.qkv.in_features)

    def outputs() -> list[torch.Tensor]:
        return [
            attention.qkv(layer.module.attention_norm(x)),
            mlp(layer.module.mlp_norm(x)),
        ]

    before = outputs()
    folded = quantize._fold_scales(layer, Recipe(4, 32))
    assert len(folded) == 2
    for old, new in zip(before, outputs(), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4 * float(old.abs().max()))


def test_calibration_text() -> None:
    class Letters:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [ord(letter) for letter in text]

    letters: object = Letters()
    text = CalibrationText.sample("abcdefgh", letters, 20, 3, seed=1)  # type: ignore[arg-type]
    assert {"".join(map(chr, window)) for window in text.token_ids.tolist()} <= {
        "abc", "bcd", "cde", "def", "efg", "fgh",
    }  # fmt: skip
    assert text.digest == CalibrationText.sample("abcdefgh", letters, 20, 3, seed=1).digest  # type: ignore[arg-type]
    assert text.digest != CalibrationText.sample("abcdefgh", letters, 20, 3, seed=2).digest  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the text has 8 tokens, a window 9"):
        CalibrationText.sample("abcdefgh", letters, 1, 9, seed=0)  # type: ignore[arg-type]
    assert len(default_text()) > 100_000
