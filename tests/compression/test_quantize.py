"""Making quantized checkpoints: what is written is what was found, and is served; every step does what it is for."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from engine.compression import quantize
from engine.compression.__main__ import main
from engine.compression.calibration import CalibratedLayer, Calibration, CalibrationText, default_text
from engine.compression.gptq import output_errors
from engine.compression.layer_quantizer import QuantizedLayer, fold_scales, quantize_layer
from engine.compression.quantize import quantize_checkpoint
from engine.compression.recipe import Recipe
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executor.runner import ModelRunner
from engine.loading.checkpoint import Checkpoint, open_checkpoint
from engine.loading.formats import stored_scheme
from engine.models.config import ModelConfig
from engine.models.modules import ROLES, module_names
from engine.quant.codebook import cluster_rows
from engine.quant.weight import CodebookWeight, GridWeight, RotatedWeight, to_float
from tests.helpers.paged import make_sequences, run_chunks
from tests.helpers.tiny import TINY_CONFIGS, load_reference, reference_logits, write_checkpoint

DOWN = "model.layers.1.mlp.down_proj"
HEAD, TABLE = "lm_head", "model.embed_tokens"
PUBLISHED, OWN = "compressed-tensors", "llm-engine"

SIZES = {"even": ("llama", {"intermediate_size": 128}), "ragged": ("llama", {})} | {
    family: (family, {}) for family in ("llama-biases", "qwen3", "gemma3", "smollm2")
}
"""Rows of "even" are filled by groups of 32 and 64, those of "ragged" have 112 columns before down_proj."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {}
    for name, (family, changes) in SIZES.items():
        config = deepcopy(TINY_CONFIGS[family])
        kinds = getattr(config, "layer_types", None)
        if kinds:
            # The last two of Gemma 3 are of different kinds.
            changes = {**changes, "layer_types": kinds[-2:]}
        config.update({"num_hidden_layers": 2, **changes})
        paths[name] = tmp_path_factory.mktemp("quantize") / name
        write_checkpoint(paths[name], config)
    return paths


def make_text(path: Path, seed: int = 0) -> CalibrationText:
    vocabulary = open_checkpoint(path).config["vocab_size"]
    token_ids = torch.randint(vocabulary, (6, 48), generator=torch.Generator().manual_seed(seed))
    return CalibrationText(token_ids, f"random {seed}")


def make(path: Path, directory: Path, recipe: Recipe) -> Checkpoint:
    quantize_checkpoint(open_checkpoint(path), recipe, make_text(path), directory, lambda line: None)
    return open_checkpoint(directory)


def first_layer(path: Path) -> CalibratedLayer:
    checkpoint = open_checkpoint(path)
    config = ModelConfig.from_dict(checkpoint.config)
    return next(Calibration(checkpoint, config, make_text(path).token_ids).layers(set()))


def make_runner(path: Path, quant: str = "auto") -> ModelRunner:
    config = EngineConfig.from_options(model=str(path), quant=quant, device="cpu", kv_cache_memory="4MiB")
    return ModelRunner(config, open_checkpoint(path))


def logits_of(runner: ModelRunner) -> torch.Tensor:
    chunks = [[12, 1, 1], [5, 3]]
    rows = run_chunks(runner, make_sequences(runner.model_config.vocab_size, chunks), chunks)
    return torch.stack([row for by_position in rows for row in by_position.values()])


@pytest.mark.parametrize(
    ("name", "scheme", "algorithm", "symmetric", "method"),
    [
        ("even", "int4:g32", "rtn", False, PUBLISHED),
        ("even", "int4:g64", "mse", True, PUBLISHED),
        ("ragged", "int4:g0", "gptq", False, PUBLISHED),
        ("ragged", "int4:g64", "percentile", False, OWN),
        ("llama-biases", "int4:g32", "awq", False, OWN),
        ("gemma3", "int4:g32", "awq+gptq", False, OWN),
        ("even", "int4:g32", "gptq+tune", False, OWN),
        ("even", "int4:g32", "clip+tune", True, PUBLISHED),
        ("even", "int8", "smoothquant", False, PUBLISHED),
        ("ragged", "int8", "rtn", False, PUBLISHED),
        ("even", "int8:g32", "rtn", False, PUBLISHED),
        ("ragged", "int8:g32", "mse", False, OWN),
        ("even", "int8:weight-only", "percentile", False, PUBLISHED),
        ("gemma3", "int4:g32:rotated", "mse+gptq", False, OWN),
        ("even", "int4:g64:rotated", "clip+gptq+tune", True, OWN),
        ("ragged", "nf4", "rtn", False, OWN),
        ("gemma3", "codebook4", "rtn", False, OWN),
    ],
)
def test_what_is_written_is_what_was_found_and_is_served(
    checkpoints: dict[str, Path],
    name: str,
    scheme: str,
    algorithm: str,
    symmetric: bool,
    method: str,
    tmp_path: Path,
) -> None:
    recipe = Recipe.parse(scheme, algorithm, is_symmetric=symmetric)
    written = make(checkpoints[name], tmp_path / "out", recipe)
    assert written.config["quantization_config"]["quant_method"] == method
    found = quantize_layer(first_layer(checkpoints[name]), recipe)
    for module, weight in found.weights.items():
        stored = written.tensor(f"{module}.weight")
        assert isinstance(weight, GridWeight | CodebookWeight | RotatedWeight)
        assert isinstance(stored, type(weight))
        codes = [(each.grid if isinstance(each, RotatedWeight) else each).codes for each in (stored, weight)]
        assert torch.equal(*codes)
        # compressed-tensors has whole zero-points; ours are their products with the scale, in fp16.
        slack = 0.0
        if isinstance(weight, GridWeight) and weight.minimum is not None and method == PUBLISHED:
            slack = 2**-11 * float(weight.minimum.abs().max())
        torch.testing.assert_close(stored.dequantize(), weight.dequantize(), rtol=0.0, atol=slack)
        assert stored_scheme(written.config, module) == scheme.removesuffix(
            ":weight-only" if method == PUBLISHED else ""
        )
    for tensor, value in found.floats.items():
        assert torch.equal(to_float(written.tensor(tensor)), value)
    assert isinstance(written.tensor(f"{TABLE}.weight"), torch.Tensor)

    runner = make_runner(tmp_path / "out")
    assert str(runner.config.quant_spec.of(DOWN)) == stored_scheme(written.config, DOWN)
    served, plain = logits_of(runner), logits_of(make_runner(tmp_path / "out", "none"))
    # On one side only, weights are expanded to int8 codes, and activations, embeddings and the cache are int8.
    assert (served - plain).std() < 0.15 * plain.std()


@pytest.mark.parametrize("algorithm", ["hadamard", "smoothquant", "hadamard+smoothquant"])
@pytest.mark.parametrize("name", ["even", "llama-biases", "qwen3", "smollm2", "gemma3"])
def test_rotations_and_scales_alone_change_no_logits(
    checkpoints: dict[str, Path], name: str, algorithm: str, tmp_path: Path
) -> None:
    if name == "gemma3" and "hadamard" in algorithm:
        with pytest.raises(ConfigError, match=r"gemma3_text has norms behind .* leave hadamard out"):
            make(checkpoints[name], tmp_path / "out", Recipe.parse("none", algorithm))
        return
    written = make(checkpoints[name], tmp_path / "out", Recipe.parse("none", algorithm))
    assert "quantization_config" not in written.config
    layer = "model.layers.1.mlp.up_proj.weight"
    before, after = (to_float(each.tensor(layer)) for each in (open_checkpoint(checkpoints[name]), written))
    assert (before - after).std() > 0.05 * before.std()
    # Read by transformers; both are read as float32.
    token_ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    expected = reference_logits(load_reference(checkpoints[name]), token_ids)
    actual = reference_logits(load_reference(tmp_path / "out"), token_ids)
    # Weights are stored in fp16, which rounds by up to 2^-11; the errors of two layers' products add up.
    assert (actual - expected).norm() < 4e-3 * expected.norm()


def test_a_rotated_checkpoint_is_quantized(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    recipe = Recipe.parse("int4:g64", "hadamard+gptq")
    written = make(checkpoints["smollm2"], tmp_path / "out", recipe)
    # A head that read the embedding has a norm's weight of its own now.
    assert written.config["tie_word_embeddings"] is False
    head, table = (to_float(written.tensor(f"{module}.weight")) for module in (HEAD, TABLE))
    assert not torch.allclose(head, table, atol=0.1)
    assert torch.equal(to_float(written.tensor("model.norm.weight")), torch.ones(72, dtype=torch.float16))
    expected = reference_logits(load_reference(checkpoints["smollm2"]), list(range(20)))[-1]
    runner = make_runner(tmp_path / "out")
    actual = run_chunks(runner, [list(range(20))], [[20]])[0][19]
    # Random weights in four bits lose much, but are far from another model's: those would differ by 1.4.
    assert (actual - expected).norm() < 0.6 * expected.norm()


MIXED = "int4:g32,lm_head=int8,*.down_proj=int8:g32,model.layers.0.*=none"


@pytest.mark.parametrize(
    ("scheme", "algorithm", "method"),
    [
        (MIXED, "kl", PUBLISHED),
        (f"{MIXED},{TABLE}=int8,*.1.mlp.gate_proj=nf4,*.1.mlp.up_proj=nf4", "gptq", OWN),
    ],
)
def test_modules_have_schemes_of_their_own(
    checkpoints: dict[str, Path], scheme: str, algorithm: str, method: str, tmp_path: Path
) -> None:
    written = make(checkpoints["even"], tmp_path / "out", Recipe.parse(scheme, algorithm))
    assert written.config["quantization_config"]["quant_method"] == method
    expected = {
        "model.layers.0.mlp.down_proj": "none",
        "model.layers.0.self_attn.q_proj": "none",
        "model.layers.1.self_attn.o_proj": "int4:g32",
        "model.layers.1.mlp.gate_proj": "int4:g32" if method == PUBLISHED else "nf4",
        DOWN: "int8:g32",
        HEAD: "int8",
        TABLE: "none" if method == PUBLISHED else "int8",
    }
    original = open_checkpoint(checkpoints["even"])
    for module, words in expected.items():
        assert stored_scheme(written.config, module) == words
        weight = written.tensor(f"{module}.weight")
        kinds = {"none": torch.Tensor, "nf4": CodebookWeight}
        assert isinstance(weight, kinds.get(words, GridWeight)), module
        values, before = to_float(weight).float(), to_float(original.tensor(f"{module}.weight")).float()
        # Sixteen levels over a group of normal values: steps of a third of their deviation.
        limit = {"none": 1e-3, "int8": 0.02, "int8:g32": 0.01}.get(words, 0.15)
        assert (values - before).std() < limit * before.std(), module
    if method == OWN:
        table = written.tensor(f"{TABLE}.weight")
        assert isinstance(table, GridWeight)
        # What the engine keeps of an embedding.
        assert (table.group_size, table.scale.dtype) == (32, torch.float16)
    runner = make_runner(tmp_path / "out")
    assert {module: str(runner.config.quant_spec.of(module)) for module in expected} == {
        # A float embedding, in a quantized model, is int8 where it is served.
        **expected,
        TABLE: "int8",
    }
    served, plain = logits_of(runner), logits_of(make_runner(tmp_path / "out", "none"))
    assert (served - plain).std() < 0.15 * plain.std()


def test_each_module_has_one_target_in_the_published_configuration(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    written = make(checkpoints["even"], tmp_path / "out", Recipe.parse(MIXED, "rtn"))
    configuration = written.config["quantization_config"]
    assert configuration["format"] == "mixed-precision"
    groups = {
        (group["weights"]["num_bits"], group["weights"]["strategy"], group["format"]): group["targets"]
        for group in configuration["config_groups"].values()
    }
    assert groups.keys() == {
        (4, "group", "pack-quantized"),
        (8, "group", "pack-quantized"),
        (8, "channel", "int-quantized"),
    }
    modules = [name for name in module_names(ModelConfig.from_dict(written.config)) if name != TABLE]
    for module in modules:
        places = [
            place
            for place, targets in [*groups.items(), ("ignored", configuration["ignore"])]
            for target in targets
            if target == module or (target[:3] == "re:" and re.match(target[3:], module))
        ]
        assert len(places) == 1, (module, places)


@pytest.mark.parametrize(
    ("scheme", "symmetric", "dequantize"),
    [
        ("int4:g32", True, False),
        # With zero-points transformers' other way in finds shapes that do not match (5.23, compressed-tensors 0.20).
        ("int4:g32", False, True),
        ("int4:g0", False, True),
        ("int8:g32", False, False),
        ("int8:weight-only", False, False),
        ("int4:g32,*.down_proj=int8:g32,model.layers.0.*=none,lm_head=int4:g64", True, False),
    ],
)
def test_what_is_published_is_what_transformers_reads(
    checkpoints: dict[str, Path], scheme: str, symmetric: bool, dequantize: bool, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    written = make(checkpoints["even"], tmp_path / "out", Recipe.parse(scheme, is_symmetric=symmetric))
    reference = load_reference(checkpoints["even"])
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(to_float(written.tensor(name)))
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype=torch.float32, **options
    ).eval()
    token_ids = list(range(30))
    expected = reference_logits(reference, token_ids)
    # They dequantize in the scales' type, fp16, where there are zero-points.
    limit = 3e-3 if dequantize else 1e-5
    assert (reference_logits(theirs, token_ids) - expected).norm() < limit * expected.norm()


def test_a_tied_head_that_is_quantized_becomes_one_of_its_own(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    written = make(checkpoints["smollm2"], tmp_path / "out", Recipe.parse("int4:g0,lm_head=int4:g0", "gptq"))
    assert written.config["tie_word_embeddings"] is False
    head, table = written.tensor("lm_head.weight"), written.tensor(f"{TABLE}.weight")
    assert isinstance(head, GridWeight)
    assert isinstance(table, torch.Tensor)
    assert 0.01 < (head.dequantize() - table).std() / table.float().std() < 0.3
    tied = make(checkpoints["smollm2"], tmp_path / "tied", Recipe.parse(f"int4:g0,{TABLE}=int8"))
    assert tied.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in tied.names()


@pytest.mark.parametrize(
    ("name", "scheme", "algorithm"),
    [
        ("even", "int4:g32", "hadamard+gptq"),
        ("llama-biases", "int4:g32", "awq"),
        ("ragged", "int8,model.layers.0.self_attn.*=none", "smoothquant"),
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    checkpoints: dict[str, Path],
    name: str,
    scheme: str,
    algorithm: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = Recipe.parse(scheme, algorithm)
    make(checkpoints[name], tmp_path / "whole", recipe)

    def stop_at_the_second(layer: CalibratedLayer, recipe: Recipe) -> QuantizedLayer:
        if layer.index == 1:
            raise KeyboardInterrupt
        return quantize_layer(layer, recipe)

    with monkeypatch.context() as patch:
        patch.setattr(quantize, "quantize_layer", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            make(checkpoints[name], tmp_path / "parts", recipe)
    assert not (tmp_path / "parts" / "config.json").exists()
    make(checkpoints[name], tmp_path / "parts", recipe)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "parts" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_directory_of_something_else_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    make(checkpoints["even"], tmp_path / "out", Recipe.parse("int4"))
    with pytest.raises(ConfigError, match="of another model, recipe or calibration"):
        make(checkpoints["even"], tmp_path / "out", Recipe.parse("int4", "hadamard"))
    with pytest.raises(ConfigError, match="is quantized already"):
        make(tmp_path / "out", tmp_path / "again", Recipe.parse("int4:g64"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="is not empty"):
        make(checkpoints["even"], tmp_path / "notes", Recipe.parse("int4"))


def test_the_record_says_how_it_was_made(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    recipe = Recipe.parse("int4,lm_head=int8,*.layers.0.*=none", "awq")
    make(checkpoints["even"], tmp_path / "out", recipe)
    record = json.loads((tmp_path / "out" / "quantization.json").read_text())
    scheme = "int4:g32,lm_head=none,model.embed_tokens=none,lm_head=int8,*.layers.0.*=none"
    assert record["recipe"] == {"scheme": scheme, "symmetric": False, "algorithm": "awq+clip"}
    assert record["calibration"] == {"windows": [6, 48], "digest": "random 0"}
    errors = record["signal_to_noise_db"]
    assert {name.split(".")[2] for name in errors if name != HEAD} == {"1"}
    # Four bits: some 20 dB; eight: 24 more.
    assert len(errors) == 8
    assert 35 < errors.pop(HEAD) < 60
    assert all(10 < decibels < 35 for decibels in errors.values())


@pytest.mark.parametrize(
    ("scheme", "algorithm", "group", "symmetric", "message"),
    [
        ("int4", "rtn", 48, False, "'g48' in 'int4:g48' is not known"),
        ("int4:g64", "rtn", 64, False, "int4:g64 says the size of groups already"),
        ("nf4", "rtn", 64, False, "nf4 has no choice of groups"),
        (
            "int8",
            "gptq",
            None,
            False,
            "gptq is for int4, the scheme has int8, which takes layers, .*, smoothquant",
        ),
        (
            "nf4",
            "mse",
            None,
            False,
            "mse is for int4 or int8, the scheme has nf4, which takes layers, channels, hadamard, prune, rtn",
        ),
        ("int4", "smoothquant", None, False, "smoothquant is for none or int8, the scheme has int4"),
        ("int8,lm_head=int4", "awq", None, False, "awq is for int4, the scheme has int8"),
        ("int4,*.down_proj=none", "smoothquant", None, False, "the scheme has int4"),
        ("int4", "gptq+hadamard", None, False, "order that cannot be; write hadamard [+] gptq"),
        ("int4", "rtn+gptq", None, False, "rtn and gptq do the same"),
        ("int4", "gtpq", None, False, "'gtpq' is not known; steps are"),
        ("none", "rtn", None, False, "none with rtn changes nothing"),
        ("int8:token", "rtn", None, False, "said when serving .* or say int8:weight-only"),
        ("int8", "rtn", None, True, "leave --symmetric out"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    scheme: str, algorithm: str, group: int | None, symmetric: bool, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe.parse(scheme, algorithm, group, symmetric)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("int4,*.q_proj=int8", "they are multiplied as one matrix; give them the same scheme"),
        ("int4,*.layers.1.mlp.up_proj=none", "they are multiplied as one matrix"),
        ("int4,*.dwon_proj=int8", "no module matches '[*].dwon_proj'"),
        (f"int4,{TABLE}=int4", "a table is none or int8"),
    ],
)
def test_what_is_not_for_the_model_is_refused(
    checkpoints: dict[str, Path], scheme: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(checkpoints["even"], tmp_path / "out", Recipe.parse(scheme))
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["nowhere", "--scheme", "int8", "--group", "32", "--algorithm", "gptq"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "error: steps: gptq is for int4" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    for word in ("codebook4", "int8[:g32|g64|g128]", "hadamard ", "tune ", "compressed-tensors"):
        assert word in text


def calibrated(path: Path) -> CalibratedLayer:
    """A layer whose inputs have a few large channels, as those of trained models do."""
    layer = first_layer(path)
    with torch.no_grad():
        for norm in layer.norms.values():
            norm.weight[::9] *= 12
    for statistics in layer.statistics.values():
        statistics.products.zero_()
        statistics.magnitudes.zero_()
        statistics.peaks.zero_()
        statistics.num_tokens = 0
    generator = torch.Generator().manual_seed(1)
    for role in (role.name for role in ROLES):
        size = layer.linears[role].in_features
        x = torch.randn(600, size // 4, generator=generator) @ torch.randn(
            size // 4, size, generator=generator
        )
        x[:, ::9] *= 12
        layer.statistics[role].update(x + 0.3 * torch.randn(600, size, generator=generator))
    return layer


def output_error(path: Path, scheme: str, algorithm: str) -> float:
    """Of the weights alone, over both roles behind attention's norm and none; in units of their float output."""
    layer = calibrated(path)
    moments = {role: statistics.second_moment for role, statistics in layer.statistics.items()}
    before = {role: {name: w.clone() for name, w in layer.weights(role).items()} for role in moments}
    norms = {name: norm.weight.clone() for name, norm in layer.norms.items()}
    weights = quantize_layer(layer, Recipe.parse(scheme, algorithm)).weights
    total = 0.0
    for role in ("qkv", "output"):
        # What a scale took out of the norm is put back, to compare with the float weight.
        ratio = layer.norms["attention_norm"].weight / norms["attention_norm"] if role == "qkv" else 1.0
        for name, old in before[role].items():
            noise = output_errors(to_float(weights[name]) * ratio - old, moments[role]).sum()
            total += float(noise / output_errors(old, moments[role]).sum())
    return total


def test_each_step_takes_errors_away(checkpoints: dict[str, Path]) -> None:
    algorithms = ("rtn", "mse", "clip", "gptq", "awq", "awq+gptq", "tune", "gptq+tune")
    errors = {name: output_error(checkpoints["ragged"], "int4:g32", name) for name in algorithms}
    assert errors["mse"] < 0.98 * errors["rtn"]
    assert errors["clip"] < 0.95 * errors["mse"]
    assert errors["gptq"] < 0.6 * errors["rtn"]
    assert errors["awq"] < 0.9 * errors["rtn"]
    assert errors["awq+gptq"] < 0.6 * errors["awq"]
    assert errors["tune"] < 0.9 * errors["rtn"]
    assert errors["gptq+tune"] < 0.97 * errors["gptq"]


def test_codebooks_weigh_columns_by_their_inputs(checkpoints: dict[str, Path]) -> None:
    layer = calibrated(checkpoints["ragged"])
    recipe = Recipe.parse("codebook4")
    weights = quantize_layer(layer, recipe).weights
    moment = layer.statistics["output"].second_moment
    ((name, weight),) = layer.weights("output").items()
    error, unweighted = (
        output_errors(new.dequantize() - weight, moment.diagonal().diag()).sum()
        for new in (weights[name], cluster_rows(weight))
        if not isinstance(new, torch.Tensor)
    )
    assert error < 0.8 * unweighted


def test_smoothing_evens_out_the_inputs(checkpoints: dict[str, Path]) -> None:
    layer = calibrated(checkpoints["ragged"])
    before = layer.statistics["qkv"].peaks
    fold_scales(layer, Recipe.parse("int8", "smoothquant"))
    after = layer.statistics["qkv"].peaks
    # Large channels are 12 times the others; half of that, in logarithms, goes to the weights.
    assert before.max() / before.median() > 8
    assert after.max() / after.median() < 5


@pytest.mark.parametrize("name", ["ragged", "llama-biases", "gemma3"])
@pytest.mark.parametrize(("scheme", "algorithm"), [("int4", "awq"), ("int8", "smoothquant")])
def test_folded_scales_change_nothing_by_themselves(
    checkpoints: dict[str, Path], name: str, scheme: str, algorithm: str
) -> None:
    layer = calibrated(checkpoints[name])
    layer.stop_recording()
    attention, mlp = layer.module.attention, layer.module.mlp
    x = torch.randn(5, attention.qkv.in_features)

    def outputs() -> list[torch.Tensor]:
        return [
            attention.qkv(layer.module.attention_norm(x)),
            mlp(layer.module.mlp_norm(x)),
        ]

    before = outputs()
    folded = fold_scales(layer, Recipe.parse(scheme, algorithm))
    assert len(folded) == (3 if name == "llama-biases" else 2)
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
