"""Low rank: factors against the papers' formulas, ranks against all there are, and what is written and served."""

from __future__ import annotations

import json
from copy import deepcopy
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from engine.compression import quantize
from engine.compression.calibration import CalibratedLayer
from engine.compression.gptq import output_errors
from engine.compression.layer_quantizer import QuantizedLayer, quantize_layer
from engine.compression.lowrank import Choice, decompose, energies, least_rank, refit, spend
from engine.compression.ranks import num_bytes, rank_step
from engine.compression.recipe import Recipe
from engine.errors import ConfigError
from engine.loading.checkpoint import open_checkpoint
from engine.models.modules import ROLES, first_of_product
from engine.quant.weight import LowRankWeight, to_float
from engine.quant_spec import parse_scheme_spec
from tests.compression.test_pruning import inputs, make
from tests.compression.test_quantize import make_text
from tests.executor.ranks.test_tensor_parallel import check_logits, shared
from tests.helpers.paged import CHUNKS, make_runner, make_sequences, run_chunks
from tests.helpers.tiny import TINY_CONFIGS, load_reference, reference_logits, write_checkpoint
from tests.helpers.trained import Bench

SHAPES = [(12, 20), (20, 12), (16, 16)]


def weight_of(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_plain_factors_are_the_truncated_singular_value_decomposition(rows: int, columns: int) -> None:
    weight = weight_of(rows, columns)
    left, values, right = np.linalg.svd(weight.numpy(), full_matrices=False)
    np.testing.assert_allclose(energies(weight, None).numpy(), values**2, rtol=1e-9)
    outer, inner = decompose(weight, None, 5)
    assert (outer.shape, inner.shape) == ((rows, 5), (5, columns))
    np.testing.assert_allclose(outer @ inner, left[:, :5] * values[:5] @ right[:5], atol=1e-9)
    # Each has the root of a singular value.
    np.testing.assert_allclose(outer.norm(dim=0).numpy(), np.sqrt(values[:5]), rtol=1e-9)
    np.testing.assert_allclose(inner.norm(dim=1).numpy(), np.sqrt(values[:5]), rtol=1e-9)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_whitened_factors_are_the_papers(rows: int, columns: int) -> None:
    """SVD-LLM, algorithm 1: S from Cholesky's decomposition of X Xᵀ, the SVD of W S cut off, and S⁻¹."""
    weight, x = weight_of(rows, columns), inputs(columns)
    moment = x.t() @ x / len(x)
    root = np.linalg.cholesky(moment.numpy())
    left, values, right = np.linalg.svd(weight.numpy() @ root, full_matrices=False)
    np.testing.assert_allclose(energies(weight, moment).numpy(), values**2, rtol=1e-7)
    outer, inner = decompose(weight, moment, 5)
    expected = left[:, :5] * values[:5] @ right[:5] @ np.linalg.inv(root)
    np.testing.assert_allclose(outer @ inner, expected, atol=1e-8)
    lost = (x @ (weight - outer @ inner).t()).square().sum(dim=1).mean()
    np.testing.assert_allclose(float(lost), (values[5:] ** 2).sum(), rtol=1e-7)


def test_inputs_that_are_not_independent_need_no_inverse() -> None:
    """Of twelve directions that are seen, rank 12 loses nothing; where Cholesky's decomposition does not exist."""
    x = inputs(20)[:12]
    weight, moment = weight_of(24, 20), x.t() @ x / 12
    outer, inner = decompose(weight, moment, 12)
    torch.testing.assert_close(x @ (outer @ inner).t(), x @ weight.t(), rtol=1e-6, atol=1e-6)
    assert bool((energies(weight, moment)[12:] < 1e-9 * energies(weight, moment)[0]).all())


def test_the_outer_factor_makes_up_for_the_inner_ones_rounding() -> None:
    weight, x = weight_of(16, 20), inputs(20)
    moment = x.t() @ x / len(x)
    outer, exact = decompose(weight, moment, 6)
    inner = (exact * 4).round() / 4
    fitted = refit(weight, inner, moment)
    best, *_ = np.linalg.lstsq((x @ inner.t()).numpy(), (x @ weight.t()).numpy(), rcond=None)
    np.testing.assert_allclose(fitted.numpy(), best.T, rtol=1e-5, atol=1e-7)
    errors = [output_errors(factor @ inner - weight, moment).sum() for factor in (outer, fitted)]
    assert errors[1] < 0.9 * errors[0]
    plain, *_ = np.linalg.lstsq(inner.t().numpy(), weight.t().numpy(), rcond=None)
    np.testing.assert_allclose(refit(weight, inner, None).numpy(), plain.T, rtol=1e-5, atol=1e-7)


def test_whitened_factors_lose_less_at_the_output() -> None:
    weight, x = weight_of(32, 64), inputs(64)
    moment = x.t() @ x / len(x)
    errors = []
    for seen in (None, moment):
        outer, inner = decompose(weight, seen, 16)
        errors.append(float(output_errors(outer @ inner - weight, moment).sum()))
    assert errors[0] > 2 * errors[1]


def random_choices(seed: int) -> list[list[Choice]]:
    """Of three matrices: ranks 1 to 4, each of which keeps less than the one before, and that they stay."""
    random = np.random.default_rng(seed)
    matrices = []
    for size in (5, 7, 11):
        kept = np.sort(random.dirichlet(np.ones(6) / 2))[::-1].cumsum()
        choices = [Choice(rank, rank * size, float(kept[rank - 1])) for rank in range(1, 5)]
        matrices.append([*choices, Choice(0, 5 * size, 1.0)])
    return matrices


@pytest.mark.parametrize("seed", range(8))
def test_a_budget_is_spent_as_the_best_of_all_choices_would_spend_it(seed: int) -> None:
    matrices = random_choices(seed)
    largest = 4 * 11
    for budget in range(23, 116, 6):
        found = spend(matrices, budget)
        assert sum(choice.num_bytes for choice in found) <= budget
        kept = sum(choice.kept for choice in found)

        def best(most: int) -> float:
            fitting = (some for some in product(*matrices) if sum(one.num_bytes for one in some) <= most)
            return max((sum(one.kept for one in some) for some in fitting), default=0.0)

        # At most one step, which does not fit whole, is lost.
        assert best(budget - largest) - 1e-9 <= kept <= best(budget) + 1e-9
    assert spend(matrices, 115) == [matrix[-1] for matrix in matrices]


def test_the_least_rank_that_keeps_the_energy() -> None:
    choices = random_choices(0)[0]
    for energy in (0.1, 0.5, 0.9, 0.999):
        choice = least_rank(choices, energy)
        assert choice.kept >= energy
        assert all(other.kept < energy for other in choices if other.num_bytes < choice.num_bytes)


def test_bytes_are_those_that_are_stored() -> None:
    assert num_bytes(parse_scheme_spec("lowrank:none:r8"), 64, 32) == 2 * 8 * (64 + 32)
    assert num_bytes(parse_scheme_spec("lowrank:int8:r8"), 64, 32) == 8 * (64 + 32) + 4 * (64 + 8)
    assert num_bytes(parse_scheme_spec("lowrank:int4:g32:r64"), 64, 96) == 64 * (64 + 96) * 5 // 8
    assert [rank_step(torch.Size(shape)) for shape in ((3072, 576), (64, 100), (7, 5))] == [64, 8, 1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lowrank") / "model"
    config = deepcopy(TINY_CONFIGS["llama-biases"])
    config.update({"num_hidden_layers": 2, "intermediate_size": 128})
    write_checkpoint(path, config)
    return path


FACTORED = "lowrank=energy0.6,svd-llm + lowrank:{}"
"""Few ranks, so that all products become factors."""


def weights_of(directory: Path) -> dict[str, LowRankWeight]:
    """The low-rank weights of a checkpoint, by module."""
    written = open_checkpoint(directory)
    modules = [
        module for layer in range(2) for role in ROLES for module in role.modules(f"model.layers.{layer}")
    ]
    weights = {module: written.tensor(f"{module}.weight") for module in modules}
    return {module: weight for module, weight in weights.items() if isinstance(weight, LowRankWeight)}


@pytest.mark.parametrize("how", ["svd", "svd-llm"])
@pytest.mark.parametrize("factors", ["none", "int8", "int4:g32"])
def test_a_checkpoint_of_factors_is_written_and_read(
    source: Path, factors: str, how: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    written = make(source, out, f"lowrank=budget0.7,{how} + lowrank:{factors}")
    found = json.loads((out / "quantization.json").read_text())
    plan, weights = found["structure"]["lowrank"], weights_of(out)
    assert plan["ranks"]
    assert len(plan["ranks"]) + len(plan["kept"]) == 8
    assert plan["bytes"] <= 0.7 * plan["bytes_before"]
    for layer in range(2):
        for role in ROLES:
            rank = plan["ranks"].get(f"model.layers.{layer}.{role.name}")
            for module in role.modules(f"model.layers.{layer}"):
                specification = written.auto_schemes([module]).get(module)
                expected = f"lowrank:{factors}:r{rank}" if rank else factors
                assert str(specification or "none") == expected
                assert (module in weights) == (rank is not None)
                assert module in found["signal_to_noise_db"] or expected == "none"
                if rank:
                    assert weights[module].rank == rank
    # What is stored of the layers' products is what was planned, the shared factors once.
    stored = 0
    for layer in range(2):
        with safe_open(out / f"model-layer-0000{layer}.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        parts = [name for name in tensors if "_proj." in name and not name.endswith("bias")]
        stored += sum(tensors[name].nbytes for name in parts)
        inner = {name.rpartition(".")[0] for name in parts if ".inner_" in name}
        assert inner == {first_of_product(module) for module in weights if f".{layer}." in module}
    assert stored == plan["bytes"]


def test_what_would_save_nothing_stays(source: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    recipe = Recipe.parse_steps("lowrank=energy0.98,svd + lowrank:int8")
    quantize.quantize_checkpoint(open_checkpoint(source), recipe, make_text(source), tmp_path, lines.append)
    plan = json.loads((tmp_path / "quantization.json").read_text())["structure"]["lowrank"]
    assert (len(plan["kept"]), plan["ranks"], plan["bytes"]) == (8, {}, plan["bytes_before"])
    assert lines[0].startswith("lowrank=energy0.98,svd: 0 of 8 products become two factors")
    assert not weights_of(tmp_path)


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = FACTORED.format("int8")
    make(source, tmp_path / "whole", steps)

    def stop_at_the_second(layer: CalibratedLayer, recipe: Recipe) -> QuantizedLayer:
        if layer.index == 1:
            raise KeyboardInterrupt
        return quantize_layer(layer, recipe)

    with monkeypatch.context() as patch:
        patch.setattr(quantize, "quantize_layer", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            make(source, tmp_path / "parts", steps)
    # The ranks are there: they are not looked for again.
    monkeypatch.setattr("engine.compression.ranks._measure", None)
    make(source, tmp_path / "parts", steps)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "parts" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("family", ["llama-biases", "smollm2"])
def test_factors_of_floats_have_the_logits_of_the_decoded_numbers(family: str, tmp_path: Path) -> None:
    config = deepcopy(TINY_CONFIGS[family])
    config.update({"num_hidden_layers": 2, "intermediate_size": 128})
    write_checkpoint(tmp_path / "model", config)
    written = make(tmp_path / "model", tmp_path / "out", FACTORED.format("none"))
    assert len(weights_of(tmp_path / "out")) == 14
    reference = load_reference(tmp_path / "model")
    floats = {name: to_float(written.tensor(name)).float() for name in written.names()}
    reference.load_state_dict(floats, strict=False)
    runner = make_runner(tmp_path / "out", kv_cache_dtype="float32")
    sequences = make_sequences(runner.model_config.vocab_size, [[30, 1]])
    expected = reference_logits(reference, sequences[0])
    for position, logits in run_chunks(runner, sequences, [[30, 1]])[0].items():
        torch.testing.assert_close(logits, expected[position], atol=1e-4, rtol=0)


@pytest.mark.parametrize("factors", ["int8", "int4:g32"])
def test_logits_do_not_depend_on_batch_chunk_or_cache(source: Path, factors: str, tmp_path: Path) -> None:
    make(source, tmp_path / "out", FACTORED.format(factors))
    assert len(weights_of(tmp_path / "out")) == 14
    runner = make_runner(tmp_path / "out")
    # Its bytes are those of the factors: another start maps them.
    assert make_runner(tmp_path / "out").model.num_bytes == runner.model.num_bytes
    sequences = make_sequences(runner.model_config.vocab_size)
    together = run_chunks(runner, sequences, CHUNKS)
    for index, (sequence, found) in enumerate(zip(sequences, together, strict=True)):
        whole = run_chunks(runner, [sequence], [[1] * len(sequence)], admission=index + 1)[0]
        assert all(torch.equal(row, whole[position]) for position, row in found.items())


@pytest.mark.parametrize("factors", ["int8", "none"])
def test_two_ranks_have_the_logits_of_one(source: Path, factors: str, tmp_path: Path) -> None:
    make(source, tmp_path / "out", FACTORED.format(factors))
    alone = make_runner(tmp_path / "out")
    with shared(tmp_path / "out", 2) as together:
        check_logits(alone, together)
    if factors == "int8":
        return  # each rank rounds activations by its own scale
    # Sums of floats, of as many as the rank has: other bits, and the same numbers.
    with shared(tmp_path / "out", 2, exact_reduce=False) as together:
        sequences = make_sequences(alone.model_config.vocab_size, [[20]])
        expected, found = (run_chunks(one, sequences, [[20]])[0] for one in (alone, together))
        torch.testing.assert_close(found[19], expected[19], atol=1e-4, rtol=0)
        layer = together.runner.model.layers[0]
        ranks = [layer.attention.output.split.num_sums, layer.mlp.down.split.num_sums]
        assert ranks == [
            weights_of(tmp_path / "out")[module].rank
            for module in ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj")
        ]


def test_the_same_numbers_are_written_dense(source: Path, tmp_path: Path) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    recipe = Recipe.parse_steps(FACTORED.format("int8"))
    quantize.quantize_checkpoint(
        open_checkpoint(source), recipe, make_text(source), out, lambda line: None, dense
    )
    floats = open_checkpoint(dense)
    for module, weight in weights_of(out).items():
        values = floats.tensor(f"{module}.weight")
        assert isinstance(values, torch.Tensor)
        assert torch.equal(values, weight.dequantize().half())


def test_what_is_no_product_of_factors_is_refused(source: Path) -> None:
    with pytest.raises(ConfigError, match=r"q_proj: the weight is no product of factors of rank 8: make one"):
        make_runner(source, quant="lowrank:int8:r8")
    with pytest.raises(ConfigError, match="lowrank has no rank: a checkpoint of factors says its own"):
        make_runner(source, quant="lowrank:int8")
    runner = make_runner(source, quant="lowrank:int8:r8", load_format="dummy")
    assert run_chunks(runner, [[1, 2, 3]], [[3]])[0][2].isfinite().all()


def test_a_budget_below_the_smallest_ranks_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"budget0.1,svd: the smallest ranks take 0\.\d+ of the bytes"):
        make(source, tmp_path / "out", "lowrank=budget0.1,svd + lowrank:int8")


def test_the_price_falls_from_plain_to_whitened(tmp_path: Path) -> None:
    """Mean of three models that were trained in floats."""
    prices = {"svd": 0.0, "svd-llm": 0.0}
    for seed in range(3):
        bench = Bench(tmp_path / str(seed), hidden=64, steps=30, seed=seed)
        for how in prices:
            log_probs = bench.compressed("lowrank:none", f"lowrank=budget0.8,{how}")
            prices[how] += bench.divergence(log_probs) / 3
    assert prices["svd"] > 2 * prices["svd-llm"] > 0
