"""Pruning: each algorithm against the papers' formulas, written naively; and zeros that every rounding keeps."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.compression.gptq import gptq, output_errors
from engine.compression.pruning import magnitude, prune, sparsegpt, wanda
from engine.compression.quantize import quantize_checkpoint
from engine.compression.recipe import Recipe
from engine.compression.steps import Prune, PruningAlgorithm
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executor.runner import ModelRunner
from engine.loading.checkpoint import Checkpoint, open_checkpoint
from engine.models.modules import ROLES
from engine.quant.int4 import Int4
from engine.quant.rounding import Ranges, fit_grid
from engine.quant.weight import GridWeight, to_float
from tests.compression.test_quantize import make_text
from tests.helpers.paged import run_chunks
from tests.helpers.tiny import TINY_CONFIGS, load_reference, reference_logits, write_checkpoint
from tests.helpers.trained import Bench

ALGORITHMS: tuple[PruningAlgorithm, ...] = ("magnitude", "wanda", "sparsegpt")


def inputs(columns: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs [tokens, columns] float64, some channels large."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, dtype=torch.float64, generator=generator)
    x = torch.randn(8 * columns, columns, dtype=torch.float64, generator=generator) @ mixing
    x[:, ::5] *= 4
    return x


def test_magnitude_takes_the_least_of_the_matrix() -> None:
    weight = torch.randn(6, 20)
    chosen = magnitude(weight, 0.35)
    ordered = sorted(abs(value) for value in weight.flatten().tolist())
    assert chosen.tolist() == [[abs(value) < ordered[42] for value in row] for row in weight.tolist()]


def test_wanda_takes_the_least_of_each_row_times_its_inputs() -> None:
    weight, x = torch.randn(6, 20, dtype=torch.float64), inputs(20)
    norms = np.sqrt((x.numpy() ** 2).sum(axis=0))
    chosen = wanda(weight, x.square().mean(dim=0), 0.25)
    for row, found in zip(weight.numpy(), chosen.tolist(), strict=True):
        least = set(np.argsort(np.abs(row) * norms)[:5].tolist())
        assert {column for column, is_chosen in enumerate(found) if is_chosen} == least


def test_two_of_four_are_the_two_least_of_each_four() -> None:
    weight, x = torch.randn(6, 20, dtype=torch.float64), inputs(20)
    for scores, chosen in (
        (weight.abs(), magnitude(weight, None)),
        (weight.abs() * x.square().mean(dim=0).sqrt(), wanda(weight, x.square().mean(dim=0), None)),
    ):
        for row in range(6):
            for start in range(0, 20, 4):
                four = scores[row, start : start + 4].tolist()
                expected = [value < sorted(four)[2] for value in four]
                assert chosen[row, start : start + 4].tolist() == expected


def naive_sparsegpt(
    weight: torch.Tensor, hessian: torch.Tensor, block_size: int, share: float | None
) -> torch.Tensor:
    """Algorithm 1 of the paper with the inverse of what is left of H computed anew for each column."""
    weight = weight.clone()
    rows, columns = weight.shape
    first = torch.tensor(
        [float(hessian[k:, k:].inverse()[0, 0]) for k in range(columns)], dtype=torch.float64
    )
    chosen = torch.zeros(rows, columns, dtype=torch.bool)
    for column in range(columns):
        if share is not None and column % block_size == 0:
            span = slice(column, column + block_size)
            scores = weight[:, span] ** 2 / first[span]
            chosen[:, span] = scores < scores.flatten().sort().values[round(share * scores.numel())]
        if share is None and column % 4 == 0:
            scores = weight[:, column : column + 4] ** 2 / first[column : column + 4]
            chosen[:, column : column + 4] = scores < scores.sort(dim=1).values[:, 2:3]
        inverse = hessian[column:, column:].inverse()
        for row in range(rows):
            if chosen[row, column]:
                weight[row, column:] -= weight[row, column] / inverse[0, 0] * inverse[0]
                weight[row, column] = 0
    return weight


@pytest.mark.parametrize("share", [0.5, 0.3, None])
def test_sparsegpt_is_the_papers(share: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.compression.pruning.BLOCK_SIZE", 8)
    weight, x = torch.randn(5, 20, dtype=torch.float64), inputs(20)
    hessian = x.t() @ x
    expected = naive_sparsegpt(weight, hessian, 8, share)
    torch.testing.assert_close(sparsegpt(weight, hessian, share, damping=0.0), expected, rtol=1e-9, atol=1e-9)


def test_sparsegpt_leaves_the_least_squares_solution() -> None:
    """Where the pruned columns come first, those that are left are the best there are."""
    weight, x = torch.randn(4, 12, dtype=torch.float64), inputs(12)
    weight[:, :6] *= 1e-4
    found = sparsegpt(weight, x.t() @ x, 0.5, damping=0.0)
    assert not found[:, :6].any()
    best, *_ = np.linalg.lstsq(x[:, 6:].numpy(), (x @ weight.t()).numpy(), rcond=None)
    np.testing.assert_allclose(found[:, 6:].numpy(), best.T, rtol=1e-7)


@pytest.mark.parametrize("is_two_of_four", [False, True])
def test_shares_are_exact_and_each_algorithm_loses_less(is_two_of_four: bool) -> None:
    weight, x = torch.randn(32, 256), inputs(256)
    moment = x.t() @ x / len(x)
    errors = {}
    for algorithm in ALGORITHMS:
        pruned = prune(weight, moment, Prune(0.5, is_two_of_four, algorithm))
        assert (pruned == 0).float().mean() == 0.5
        if is_two_of_four:
            assert ((pruned == 0).view(32, -1, 4).sum(dim=2) == 2).all()
        errors[algorithm] = float(output_errors(pruned - weight, moment).sum())
    assert errors["magnitude"] > errors["wanda"] > 1.2 * errors["sparsegpt"]


def test_equal_weights_are_pruned_to_the_share_too() -> None:
    weight = torch.ones(4, 8)
    assert magnitude(weight, 0.5).sum() == 16
    assert (magnitude(weight, None).view(-1, 4).sum(dim=1) == 2).all()


def test_gptq_keeps_zeros_and_makes_up_for_the_others() -> None:
    """Column by column in float64: a pruned weight is rounded to zero, whatever the columns before made of it."""
    weight, x = torch.randn(8, 96, dtype=torch.float64), inputs(96)
    moment = x.t() @ x / len(x)
    pruned = sparsegpt(weight, moment, 0.5)
    steps = {}

    def find(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ranges = Ranges(values.amin(dim=1).clamp(max=0), values.amax(dim=1).clamp(min=0))
        grid = fit_grid(ranges, 4, False, keeps_zero=True)
        assert grid.minimum is not None
        steps[len(steps)] = grid
        return grid.scale, grid.minimum

    held = gptq(pruned, moment, find, 32, 16, damping=0.0, kept=pruned != 0).dequantize()
    expected = pruned.clone()
    for column in range(96):
        grid, values = steps[column // 32], expected[:, column].clone()
        assert grid.minimum is not None
        scale, minimum = grid.scale.double(), grid.minimum.double()
        rounded = ((values - minimum) / scale).round().clamp(0, 15) * scale + minimum
        rounded[pruned[:, column] == 0] = 0
        inverse = moment[column:, column:].inverse()
        expected[:, column:] -= torch.outer((values - rounded) / inverse[0, 0], inverse[0])
        expected[:, column] = rounded
    assert not held[pruned == 0].any()
    torch.testing.assert_close(held.double(), expected, rtol=1e-5, atol=1e-6)
    free = gptq(pruned, moment, find, 32, 16, damping=0.0).dequantize()
    assert (free[pruned == 0] != 0).float().mean() > 0.3


@pytest.mark.parametrize("magnitude_", [1.0, 1e-3, 3e-6])
def test_zero_is_a_code_to_the_last_bit(magnitude_: float) -> None:
    """fp16 rounds the product of a scale and a zero-point, unless the scale's mantissa is short."""
    low = -magnitude_ * torch.rand(500)
    ranges = Ranges(low[:, None], magnitude_ * torch.rand(500, 1))
    for keeps_zero in (False, True):
        grid = fit_grid(ranges, 4, False, keeps_zero=keeps_zero)
        assert grid.minimum is not None
        at_zero = grid.zero * grid.scale.float() + grid.minimum.float()
        assert bool(at_zero.any()) == (not keeps_zero and magnitude_ > 1e-5)
    plain = fit_grid(ranges, 4, False)
    assert (grid.scale >= plain.scale).all()
    if magnitude_ > 1e-5:
        assert (grid.scale <= plain.scale * (1 + 2**-6)).all()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prune") / "model"
    config = deepcopy(TINY_CONFIGS["llama-biases"])
    config.update({"num_hidden_layers": 2, "intermediate_size": 128})
    write_checkpoint(path, config)
    return path


def make(source: Path, directory: Path, steps: str, is_symmetric: bool = False) -> Checkpoint:
    recipe = Recipe.parse_steps(steps, None, is_symmetric)
    quantize_checkpoint(open_checkpoint(source), recipe, make_text(source), directory, lambda line: None)
    return open_checkpoint(directory)


@pytest.mark.parametrize(
    ("steps", "is_symmetric"),
    [
        ("prune=2of4,sparsegpt + none", False),
        ("prune=2of4,magnitude + smoothquant + int8", False),
        ("prune=2of4,wanda + int8:g32", False),
        ("prune=2of4,wanda + int4:g32", False),
        ("prune=2of4,magnitude + percentile + int4:g0", False),
        ("prune=2of4,sparsegpt + awq + gptq + int4:g32", False),
        ("prune=2of4,wanda + mse + int4:g64", False),
        ("hadamard + prune=2of4,wanda + clip + int4:g32", False),
        ("prune=2of4,sparsegpt + gptq + int4:g32", True),
        ("prune=2of4,sparsegpt + gptq + tune + int4:g32", True),
        ("prune=2of4,sparsegpt + nf4", False),
        ("prune=2of4,sparsegpt + mse + sparse24:int8", False),
        ("prune=2of4,sparsegpt + awq + gptq + sparse24:int4:g64", False),
        ("prune=2of4,sparsegpt + int4:g32,*.down_proj=int8,*.layers.0.self_attn.*=none", False),
    ],
)
def test_every_rounding_keeps_the_zeros(source: Path, steps: str, is_symmetric: bool, tmp_path: Path) -> None:
    written = make(source, tmp_path / "out", steps, is_symmetric)
    stored_like_floats = []
    for layer in range(2):
        for role in ROLES:
            for module in role.modules(f"model.layers.{layer}"):
                weight = written.tensor(f"{module}.weight")
                zeros = (to_float(weight).view(-1, 4) == 0).sum(dim=1)
                assert (zeros >= 2).all(), module
                stored_like_floats.append(float((zeros > 2).float().mean()))
                if isinstance(weight, GridWeight) and weight.codes.dtype == torch.uint8:
                    # As the engine keeps it, too.
                    stored = Int4(weight.group_size).quantize(weight)
                    minimum = stored["minimum"].float().repeat_interleave(weight.group_size, dim=1)
                    scale = stored["scale"].float().repeat_interleave(weight.group_size, dim=1)
                    columns = weight.shape[1]
                    decoded = weight.codes.float() * scale[:, :columns] + minimum[:, :columns]
                    assert torch.equal(decoded == 0, to_float(weight) == 0)
    # Few others become zeros, but of those that four bits round to zero.
    assert min(stored_like_floats) < 0.6
    record = json.loads((tmp_path / "out" / "quantization.json").read_text())
    assert len(record["pruning_signal_to_noise_db"]) == 14
    assert all(0 < decibels < 30 for decibels in record["pruning_signal_to_noise_db"].values())
    config = EngineConfig.from_options(model=str(tmp_path / "out"), device="cpu", kv_cache_memory="4MiB")
    ModelRunner(config, written)


def test_pruned_floats_are_what_transformers_reads(source: Path, tmp_path: Path) -> None:
    written = make(source, tmp_path / "out", "prune=0.5,sparsegpt + none")
    assert "quantization_config" not in written.config
    reference = load_reference(tmp_path / "out")
    weights = [module.weight for name, module in reference.named_modules() if name.endswith("_proj")]
    assert len(weights) == 14
    assert all(abs(float((weight == 0).float().mean()) - 0.5) < 0.01 for weight in weights)
    # A model of zeros in half of its weights is another one, but no stranger.
    token_ids = list(range(30))
    pruned, whole = (reference_logits(model, token_ids) for model in (reference, load_reference(source)))
    assert 0.05 < (pruned - whole).norm() / whole.norm() < 1.2


@pytest.mark.parametrize("steps", ["prune=2of4,sparsegpt + int8", "prune=2of4,wanda + awq + nf4,*.0.*=int4"])
def test_the_same_numbers_are_written_dense_and_transformers_has_their_logits(
    source: Path, steps: str, tmp_path: Path
) -> None:
    recipe, out, dense = Recipe.parse_steps(steps), tmp_path / "out", tmp_path / "dense"

    def run() -> None:
        quantize_checkpoint(open_checkpoint(source), recipe, make_text(source), out, lambda line: None, dense)

    run()
    written, floats = open_checkpoint(out), open_checkpoint(dense)
    assert "quantization_config" not in floats.config
    assert floats.names() == written.names()
    for name in written.names():
        weight, values = to_float(written.tensor(name)), floats.tensor(name)
        assert isinstance(values, torch.Tensor)
        assert torch.equal(values, weight.half())
        assert torch.equal(values == 0, weight.half() == 0)
    record = (out / "quantization.json").read_bytes()
    assert (dense / "quantization.json").read_bytes() == record
    config = EngineConfig.from_options(model=str(out), quant="none", device="cpu", kv_cache_memory="4MiB")
    token_ids = list(range(30))
    ours = run_chunks(ModelRunner(config, written), [token_ids], [[30]])[0][29]
    theirs = reference_logits(load_reference(dense), token_ids)[-1]
    assert (ours - theirs).norm() < 2e-3 * theirs.norm()  # float16 of the numbers
    # Goes on where it stopped, and leaves what is there.
    (dense / "model-layer-00001.safetensors").unlink()
    files = {file.name: file.stat().st_mtime_ns for file in dense.glob("*.safetensors")}
    run()
    assert (dense / "model-layer-00001.safetensors").exists()
    assert (
        files.items() < {file.name: file.stat().st_mtime_ns for file in dense.glob("*.safetensors")}.items()
    )


def test_a_dense_directory_that_cannot_be_is_refused_at_once(source: Path, tmp_path: Path) -> None:
    def run(steps: str, dense: str) -> None:
        recipe, out = Recipe.parse_steps(steps), tmp_path / "out"
        quantize_checkpoint(
            open_checkpoint(source), recipe, make_text(source), out, lambda line: None, tmp_path / dense
        )

    with pytest.raises(ConfigError, match=r"dense: .*out will be a checkpoint of floats; leave --dense out"):
        run("prune=0.5,wanda + none", "dense")
    with pytest.raises(ConfigError, match="dense: is the same directory as --out"):
        run("prune=0.5,wanda + int8", "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"dense: .*other is not empty"):
        run("prune=0.5,wanda + int8", "other")


def test_inputs_that_are_no_whole_fours_are_refused(tmp_path: Path) -> None:
    config = deepcopy(TINY_CONFIGS["llama"])
    config.update({"num_hidden_layers": 1, "intermediate_size": 110})
    write_checkpoint(tmp_path / "model", config)
    with pytest.raises(ConfigError, match=r"prune=2of4,wanda: mlp.down_proj has 110 inputs, .* give a share"):
        make(tmp_path / "model", tmp_path / "out", "prune=2of4,wanda + int8")
    assert not (tmp_path / "out").exists()


def test_the_command_says_that_zeros_alone_save_nothing(source: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    recipe = Recipe.parse_steps("prune=0.5,magnitude + int8")
    quantize_checkpoint(open_checkpoint(source), recipe, make_text(source), tmp_path / "out", lines.append)
    assert lines[-1] == (
        "prune=0.5,magnitude: the zeros of 14 of 14 matrices are stored and multiplied as any weight is, which makes "
        "them neither smaller nor faster; two of four (2of4) are both under sparse24:int8 and sparse24:int4"
    )
    assert " dB of zeros" in lines[-2]


def test_the_price_falls_from_magnitude_to_wanda_to_sparsegpt(tmp_path: Path) -> None:
    """Mean of three models that were trained in floats."""
    prices = dict.fromkeys(ALGORITHMS, 0.0)
    for seed in range(3):
        bench = Bench(tmp_path / str(seed), hidden=64, steps=30, seed=seed)
        for algorithm in ALGORITHMS:
            prices[algorithm] += bench.divergence(bench.compressed("none", f"prune=0.5,{algorithm}")) / 3
    assert prices["magnitude"] > 2 * prices["wanda"] > 3 * prices["sparsegpt"]
