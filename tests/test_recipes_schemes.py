"""CONTRIBUTING's recipes for a scheme and for a projection: followed in a copy of engine/, and then used.

Each copy is edited by the test and nothing else, and runs in a process of its own.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.compression.hadamard import make_rotation, rotate_inputs
from engine.compression.rotated import ROTATION_SEED, rotated
from engine.config import EngineConfig, SchedulerConfig
from engine.core.sampling_params import SamplingParams
from engine.errors import CheckpointError
from engine.executor.runner import ModelRunner
from engine.frontend.llm import LLM
from engine.loading.checkpoint import Checkpoint, open_checkpoint
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.linear import Linear
from engine.models.modules import module_names
from engine.models.shapes import tensor_shape
from engine.parallel.group import TensorGroup
from engine.parallel.pipeline import Pipeline
from engine.parallel.shards import Shard
from engine.quant.block_weight import BLOCK_TYPES
from engine.quant.plan import SCHEMES, QuantizationPlan
from engine.quant.weight import GridWeight, to_float
from engine.quant_spec import CHOICES, KINDS, parse_quant_spec
from engine.tokenizer.files import byte_tokenizer
from tests.helpers.gguf_file import write_gguf
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint

ROOT = Path(__file__).parents[1]

INT6 = '''
"""Int6: six bits a weight in int8 codes, one scale a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from engine.quant.int8 import Int8
from engine.quant.scheme import Matmul, Tensors
from engine.quant.weight import GridWeight, Weight, to_float


@dataclass(frozen=True)
class Int6:
    name: str = "int6"
    integer_sums: ClassVar[None] = None

    def storage(self, out_features: int, in_features: int) -> Tensors:
        return Int8().storage(out_features, in_features)

    def quantize(self, weight: Weight) -> Tensors:
        if not (isinstance(weight, GridWeight) and weight.codes.dtype == torch.int8):
            weight = round_to_int6(to_float(weight).float())
        return {"weight": weight.codes, "scale": weight.scale[:, 0]}

    def random(self, out_features: int, in_features: int, device: torch.device) -> Tensors:
        return self.quantize(torch.randn(out_features, in_features, device=device) * in_features**-0.5)

    def bind(self, tensors: Tensors, bias: torch.Tensor | None) -> Matmul:
        return Int8().bind(tensors, bias)


def round_to_int6(weight: torch.Tensor) -> GridWeight:
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-20) / 31
    return GridWeight((weight / scale).round().to(torch.int8), scale, None, weight.shape[1])
'''

SCHEME_EDITS = {
    "quant_spec.py": [
        (
            '    "nf4": SchemeGrammar(',
            '    "int6": SchemeGrammar(help=(("int6", "six bits, a scale a row"),)),\n    "nf4": SchemeGrammar(',
        )
    ],
    "quant/plan.py": [
        (
            "from engine.quant.int8 import",
            "from engine.quant.int6 import Int6, round_to_int6\nfrom engine.quant.int8 import",
        ),
        (
            '    "nf4": RegisteredScheme(',
            """    "int6": RegisteredScheme(
        make=lambda words, plan: Int6(),
        read=read_int8,
        round=lambda weight, importance: round_to_int6(weight),
    ),
    "nf4": RegisteredScheme(""",
        ),
    ],
}

GATE_EDITS = {
    "models/modules.py": [
        (
            '    Role(\n        name="output",',
            """    Role(
        name="attention_gate",
        block="attention",
        projections=(Projection("self_attn.g_proj", "attn_gate", _queries),),
        in_features=_hidden,
        has_bias=lambda config: False,
        split="heads",
        norm="attention_norm",
    ),
    Role(
        name="output",""",
        )
    ]
}

NUM_LAYERS = 2
GATE = "model.layers.{}.self_attn.g_proj"


def edited_copy(
    path: Path, edits: dict[str, list[tuple[str, str]]], added: dict[str, str] | None = None
) -> tuple[Path, list[str]]:
    """A copy of engine/ with texts replaced and files added, and the source files in which it differs."""
    copy = path / "engine"
    shutil.copytree(ROOT / "engine", copy, ignore=shutil.ignore_patterns("__pycache__"))
    for name, pairs in edits.items():
        text = (copy / name).read_text()
        for old, new in pairs:
            assert text.count(old) == 1, f"{name}: {old!r}"
            text = text.replace(old, new)
        (copy / name).write_text(text)
    for name, text in (added or {}).items():
        (copy / name).write_text(text)
    files = [str(file.relative_to(copy)) for file in copy.rglob("*") if file.is_file()]
    _, differing, missing = filecmp.cmpfiles(ROOT / "engine", copy, files, shallow=False)
    return path, sorted(differing + missing)


def run_in(copy: Path, check: Callable[[Path], None], directory: Path) -> None:
    """Calls a function of this module with the copy in engine's place."""
    program = (
        f"import sys, engine; assert engine.__file__.startswith({str(copy)!r}), engine.__file__\n"
        f"from pathlib import Path; from {__name__} import {check.__name__} as check; check(Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{copy}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", program, str(directory)]
    run = subprocess.run(command, env=environment, cwd=copy, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


def write_model(path: Path, extra: dict[str, torch.Tensor]) -> None:
    """A tiny Llama with a tokenizer, whose weights float16 holds exactly, with more tensors than it has."""
    config = deepcopy(TINY_CONFIGS["llama"])
    config.update({"num_hidden_layers": NUM_LAYERS})
    write_checkpoint(path, config)
    file = path / "model.safetensors"
    tensors = load_file(file) | extra
    save_file({name: tensor.half().float() for name, tensor in tensors.items()}, file, {"format": "pt"})
    byte_tokenizer().save(str(path / "tokenizer.json"))


def config_of(model: Path, quant: str) -> EngineConfig:
    return EngineConfig.from_options(model=str(model), quant=quant, device="cpu", kv_cache_memory="4MiB")


def generated(model: Path, quant: str) -> list[object]:
    """Tokens and log-probabilities, as they are printed."""
    llm = LLM(str(model), quant=quant, device="cpu", kv_cache_memory="4MiB")
    params = SamplingParams(max_tokens=6, temperature=0.0, logprobs=3, ignore_eos=True)
    (output,) = llm.generate([[5, 6, 7, 8]], params, use_tqdm=False)
    return [output.outputs[0].token_ids, str(output.outputs[0].logprobs)]


def compress(model: Path, out: Path, *words: str) -> Checkpoint:
    """What `python -m engine.quant` makes of the model."""
    command = [sys.executable, "-m", "engine.quant", str(model), "--windows", "2", "--length", "32"]
    run = subprocess.run([*command, *words, "--out", str(out)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return open_checkpoint(out)


def test_every_kind_that_can_be_said_has_an_implementation() -> None:
    assert list(KINDS) == list(SCHEMES)
    assert [kind for kind in CHOICES if SCHEMES[kind].read is None] == ["none"]
    assert [kind for kind in KINDS if kind not in CHOICES] == list(BLOCK_TYPES)


def test_a_scheme_is_its_own_file_and_two_rows(tmp_path: Path) -> None:
    copy, files = edited_copy(tmp_path / "copy", SCHEME_EDITS, {"quant/int6.py": INT6})
    assert files == ["quant/int6.py", "quant/plan.py", "quant_spec.py"]  # of at most four
    write_model(tmp_path / "model", {})
    run_in(copy, check_scheme, tmp_path)


def check_scheme(directory: Path) -> None:
    model, out = directory / "model", directory / "out"
    assert str(parse_quant_spec("int6").of("lm_head")) == "int8:g32"
    shown = subprocess.run(
        [sys.executable, "-m", "engine.quant", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "  int6                     six bits, a scale a row\n" in shown
    assert "the only one for int6, nf4 and codebook4" in shown or "int6 and nf4 and codebook4" in shown
    options = EngineConfig.__dataclass_fields__["quant"].metadata["help"]
    assert "none, int8, int4, int6, nf4, codebook4, sparse24:int8, sparse24:int4, lowrank:none, " in options

    source = open_checkpoint(model)
    written = compress(model, out, "--scheme", "int6")
    assert written.config["quantization_config"]["quant_method"] == "llm-engine"
    round_weight = SCHEMES["int6"].round
    assert round_weight is not None
    modules = [name for name in module_names(ModelConfig.from_dict(source.config)) if "layers" in name]
    for module in modules:
        expected = round_weight(to_float(source.tensor(f"{module}.weight")), None)
        found = written.tensor(f"{module}.weight")
        assert isinstance(expected, GridWeight)
        assert isinstance(found, GridWeight)
        assert found.codes.abs().amax() == 31
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.scale, expected.scale)
    served = generated(out, "auto")
    assert served == generated(model, "int6")
    assert served != generated(model, "int8")


def test_a_projection_is_one_row(tmp_path: Path) -> None:
    copy, files = edited_copy(tmp_path / "copy", GATE_EDITS)
    assert files == ["models/modules.py"]
    write_model(tmp_path / "plain", {})
    shape = TINY_CONFIGS["llama"].hidden_size
    gates = {f"{GATE.format(layer)}.weight": 0.2 * torch.randn(shape, shape) for layer in range(NUM_LAYERS)}
    write_model(tmp_path / "model", gates)
    runner = ModelRunner(config_of(tmp_path / "plain", "int8"), open_checkpoint(tmp_path / "plain"))
    facts = {"weights": runner.plan.weights, "activations": runner.plan.activations}
    (tmp_path / "plain.json").write_text(
        json.dumps(facts | {"logits": generated(tmp_path / "plain", "int8")})
    )
    run_in(copy, check_projection, tmp_path)


def check_projection(directory: Path) -> None:
    plain, model, out = directory / "plain", directory / "model", directory / "out"
    source = open_checkpoint(model)
    config = ModelConfig.from_dict(source.config)
    hidden = config.hidden_size
    # Names, shapes, GGUF.
    gates = [GATE.format(layer) for layer in range(NUM_LAYERS)]
    assert [name for name in module_names(config) if name in gates] == gates
    assert tensor_shape(config, f"{gates[1]}.weight") == (hidden, hidden)
    tensors = {"blk.0.attn_gate.weight": np.zeros((64, 64), np.float32)}
    gguf = open_checkpoint(write_gguf(directory / "model.gguf", tensors=tensors))  # type: ignore[arg-type]
    assert f"{gates[0]}.weight" in gguf.names()

    # Loading and --quant, with the plan's bytes; what the layer computes is its own affair.
    with pytest.raises(CheckpointError, match="g_proj"):
        ModelRunner(config_of(plain, "int8"), open_checkpoint(plain))
    runner = ModelRunner(config_of(model, "int8"), source)
    before = json.loads((directory / "plain.json").read_text())
    codes_and_scales = NUM_LAYERS * (hidden * hidden + 4 * hidden)
    assert runner.plan.weights == before["weights"] + codes_and_scales
    limits = SchedulerConfig.resolve(runner.config, runner.plan.max_model_len, "cpu")
    tokens = limits.max_num_batched_tokens
    assert runner.plan.activations == before["activations"] + tokens * 4 * hidden
    assert generated(model, "int8") == before["logits"]
    mixed = ModelRunner(config_of(model, "int8,*.g_proj=int4:g64"), source)
    groups = NUM_LAYERS * (hidden * hidden // 2 + 4 * hidden)
    assert mixed.plan.weights == before["weights"] + groups
    dummy = ModelRunner(replace(config_of(model, "int8"), load_format="dummy"), source)
    assert dummy.plan.weights == runner.plan.weights

    # A rank's share.
    group = TensorGroup(Shard(1, 2), None, False)
    shared = Decoder(
        config, QuantizationPlan(parse_quant_spec("int8"), torch.float32), torch.float32, group, Pipeline()
    )
    gate = shared.layers[0].attention.attention_gate
    assert isinstance(gate, Linear)
    assert [part.rows for part in gate.parts] == [slice(hidden // 2, hidden)]

    # Compression: found from what attention's norm gives, which gives up a scale to all that read it.
    written = compress(model, out, "--scheme", "int8", "--algorithm", "smoothquant")
    record = json.loads((out / "quantization.json").read_text())["signal_to_noise_db"]
    for layer, name in enumerate(gates):
        assert record[name] > 20
        norm = f"model.layers.{layer}.input_layernorm.weight"
        ratio = to_float(source.tensor(norm)) / to_float(written.tensor(norm))
        assert not torch.allclose(ratio, torch.ones(1))
        weight = to_float(source.tensor(f"{name}.weight")) * ratio
        step = weight.abs().amax(dim=1, keepdim=True) / 127
        difference = (to_float(written.tensor(f"{name}.weight")) - weight).abs()
        assert bool((difference <= 0.501 * step).all())
    assert generated(out, "auto") == generated(out, "int8")
    turned = rotated(source, config).tensor(f"{gates[0]}.weight")
    folded = to_float(source.tensor(f"{gates[0]}.weight")) * to_float(
        source.tensor("model.layers.0.input_layernorm.weight")
    )
    expected = rotate_inputs(folded, make_rotation(hidden, ROTATION_SEED))
    torch.testing.assert_close(to_float(turned), expected)
