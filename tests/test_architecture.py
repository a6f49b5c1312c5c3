"""The directions of imports, read from the source: each part knows only what lies below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Higher parts may import lower ones; a part is named by its longest matching prefix.
LEVELS = {
    "engine.errors": 0,
    "engine.cache_directory": 0,
    "engine.specification": 1,
    "engine.config": 1,
    "engine.outputs": 1,
    "engine.metrics": 1,
    "engine.sampling.params": 1,
    "engine.sampling.noise": 1,
    "engine.sampling.random": 1,
    "engine.quant.weight": 1,
    "engine.request": 2,
    "engine.batch": 2,
    "engine.kv_cache": 3,
    "engine.chat_template": 3,
    "engine.token_pieces": 3,
    "engine.kernels": 4,
    "engine.kernels.compile": 11,
    "engine.parallel": 5,
    "engine.parallel.messages": 6,
    "engine.parallel.ranks": 11,
    "engine.parallel.rank_process": 11,
    "engine.parallel.ray_ranks": 11,
    "engine.parallel.ray_serve": 15,
    "engine.process": 0,
    "engine.quant": 5,
    "engine.quant.__main__": 15,
    "engine.calibration": 10,
    "engine.recipe": 6,
    "engine.layer_quantizer": 11,
    "engine.quantize": 12,
    "engine.models.config": 5,
    "engine.sampling": 5,
    "engine.layers": 6,
    "engine.models": 7,
    "engine.loading": 8,
    "engine.tokenizer": 9,
    "engine.memory": 9,
    "engine.scheduler": 9,
    "engine.options": 5,
    "engine.cuda_graphs": 5,
    "engine.step_buffers": 6,
    "engine.host_executor": 9,
    "engine.program_executor": 9,
    "engine.device_executor": 9,
    "engine.warmup": 10,
    "engine.runner": 10,
    "engine.core": 11,
    "engine.messages": 11,
    "engine.validation": 11,
    "engine.output_processor": 11,
    "engine.engine_process": 12,
    "engine.llm": 12,
    "engine.async_engine": 12,
    "api": 13,
    "engine.serve": 14,
    "engine.plan": 15,
    "engine.selftest": 15,
    "engine.quality": 15,
}
FILES = sorted([*(ROOT / "engine").rglob("*.py"), *(ROOT / "api").rglob("*.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def level(module: str) -> int:
    while module not in LEVELS:
        module = module.rpartition(".")[0]
        if not module:
            pytest.fail("a module without a level: give it one in LEVELS")
    return LEVELS[module]


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {
                f"{node.module}.{alias.name}"
                if (ROOT / node.module.replace(".", "/") / f"{alias.name}.py").exists()
                else node.module
                for alias in node.names
                if node.module
            }
    return names


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_downwards(path: Path) -> None:
    module = module_name(path)
    if module == "engine":
        return  # the package itself only passes names on
    for name in imports(path):
        if name.split(".")[0] in ("engine", "api") and name != "engine":
            assert level(name) <= level(module), f"{module} imports {name}, which lies above it"


@pytest.mark.parametrize("name", ["scheduler", "kv_cache", "batch", "request", "config", "validation"])
def test_planning_knows_nothing_of_torch(name: str) -> None:
    assert "torch" not in {module.split(".")[0] for module in imports(ROOT / f"engine/{name}.py")}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_the_library_imports_no_web_framework(path: Path) -> None:
    if module_name(path).startswith("engine"):
        roots = {module.split(".")[0] for module in imports(path)}
        assert not roots & {"fastapi", "starlette", "uvicorn", "prometheus_client", "pydantic"}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_the_api_knows_no_more_than_the_async_engine(path: Path) -> None:
    if module_name(path).startswith("api"):
        known = ("engine.async_engine", "engine.errors", "engine.config", "engine.outputs", "engine.metrics")
        for name in imports(path):
            if name.startswith("engine"):
                assert name.startswith((*known, "engine.sampling.params", "engine.tokenizer")), name
