"""CONTRIBUTING's recipe for a sampling parameter, followed in a copy of the tree: four files; the rest follows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint

ROOT = Path(__file__).parent.parent

RECIPE = {
    "engine/core/sampling_params.py": (
        "    presence_penalty: float = ",
        "    typical_shift: float = _parameter(0.0, Range(low=-9.0, high=9.0), is_recommended=True, example=0.5)\n",
    ),
    "api/protocol.py": (
        "    repetition_penalty: float | None = None\n",
        "    typical_shift: float | None = None\n",
    ),
    "engine/kernels/sample.py": (
        "    min_p: torch.Tensor\n",
        "    typical_shift: torch.Tensor\n",
    ),
    "engine/executor/sampler.py": (
        "    # Temperature; top_k, min_p",
        "    # typical_shift, times the token's id.\n"
        "    token_ids = torch.arange(logits.shape[1], device=logits.device)\n"
        "    logits += inputs.parameters.typical_shift[: len(wanted), None] * token_ids\n\n",
    ),
}
"""By file, a line and what is written before it: a parameter that adds a multiple of a token's id to its logit."""

SCRIPT = """
import json, sys
from pathlib import Path

import engine
from api.errors import ApiError
from api.protocol import ChatCompletionRequest, CompletionRequest, decode_request
from api.sampling import sampling_params
from engine.config import EngineConfig
from engine.core.request import Request
from engine.core.sampling_params import SamplingParams
from engine.errors import RequestError
from engine.executor.start import start_engine
from engine.executor.warmup import FULL
from engine.quality.invariants import PARAMS

path = Path(sys.argv[1])
limits = {"kv_cache_memory": "4MiB", "num_threads": 1, "max_num_seqs": 4, "max_num_batched_tokens": 16}
config = EngineConfig(model=str(path), device="cpu", **limits)
core = start_engine(config, path, eos_token_ids=())
shifts = {"none": {}, "up": {"typical_shift": 9.0}, "down": {"typical_shift": -9}}
for name, shift in shifts.items():
    params = SamplingParams(temperature=0.8, max_tokens=3, **shift)
    core.add_request(Request(request_id=name, prompt_token_ids=[5, 6, 7], params=params, seed=1))
tokens = {name: [] for name in shifts}
while core.has_work:
    for output in core.step():
        assert output.error is None, output.error
        tokens[output.request_id] += [token.token_id for token in output.tokens]

def asked(fields, kind=CompletionRequest):
    body = json.dumps({"prompt": "x", **fields} if kind is CompletionRequest else {"messages": [], **fields})
    request = decode_request(body.encode(), kind)
    return sampling_params(request, core.info.default_params, max_tokens=1, logprobs=None).typical_shift

refusals = []
for value in (9.5, "much"):
    try:
        asked({"typical_shift": value})
    except (RequestError, ApiError) as error:
        refusals.append(str(error))

print(json.dumps({
    "engine": engine.__file__,
    "executor": type(core.model.runner.executor).__name__,
    "tokens": tokens,
    "asked": [asked({"typical_shift": 1.5}), asked({"typical_shift": 0}, ChatCompletionRequest)],
    "recommended": asked({}),
    "refusals": refusals,
    "warm_up": FULL.typical_shift,
    "self_test": sorted({params.typical_shift for params in PARAMS}),
}))
"""


def follow(recipe: dict[str, tuple[str, str]], tree: Path) -> None:
    """Writes each text before its line, which must be there once."""
    for name, (line, text) in recipe.items():
        source = (tree / name).read_text()
        assert source.count(line) == 1, f"{name} has {source.count(line)} lines with {line!r}"
        (tree / name).write_text(source.replace(line, text + line))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, in which the recipe was followed."""
    path = tmp_path_factory.mktemp("recipe")
    for package in ("engine", "api"):
        shutil.copytree(ROOT / package, path / package, ignore=shutil.ignore_patterns("__pycache__"))
    follow(RECIPE, path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It recommends a shift."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    write_checkpoint(path, TINY_CONFIGS["llama"])
    (path / "generation_config.json").write_text(json.dumps({"typical_shift": 1, "top_k": 7}))
    return path


def run(tree: Path, model: Path, **environment: str) -> dict[str, Any]:
    """What the script prints in the tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree), **environment}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model)], cwd=tree, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert Path(results["engine"]).is_relative_to(tree)
    return results


def test_a_sampling_parameter_is_four_files(tree: Path, model: Path) -> None:
    edited = [
        path for path in tree.rglob("*.py") if path.read_text() != (ROOT / path.relative_to(tree)).read_text()
    ]
    assert len(edited) <= 4
    results = run(tree, model)
    assert results["executor"] == "CpuExecutor"
    # Nine times a token's id is far above any logit.
    assert results["tokens"]["up"] == [319] * 3
    assert results["tokens"]["down"] == [0] * 3
    assert not set(results["tokens"]["none"]) & {0, 319}
    assert results["asked"] == [1.5, 0]
    assert results["recommended"] == 1.0
    assert "typical_shift must be between -9.0 and 9.0, got 9.5" in results["refusals"][0]
    assert "typical_shift: expected float" in results["refusals"][1]
    assert results["warm_up"] == 0.5
    assert results["self_test"] == [0.0, 0.5]


def test_it_reaches_the_device_with_the_step(tree: Path, model: Path) -> None:
    """As a word of the one array that a step copies, which Triton's kernels read."""
    results = run(tree, model, TRITON_INTERPRET="1")
    assert results["executor"] == "TritonExecutor"
    assert results["tokens"]["up"] == [319] * 3
    assert results["tokens"]["down"] == [0] * 3
