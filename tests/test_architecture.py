"""The folder is the layer: each imports only folders below it, read from the source."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

GROUND = ("errors", "cache_directory", "process", "quant_spec", "config", "arguments", "installation", "logs")
"""Files flat in engine/ that import nothing but each other."""

ORDER = (
    "core", "kernels", "quant", "parallel", "models", "loading", "tokenizer", "executor", "compression", "frontend",
    "router", "quality",
)  # fmt: skip
"""Folders of engine/, the lowest first. api/ stands above them."""

OLD_NAMES = ("engine.kernels.compile", "engine.parallel.ray_serve")
"""Thin files that keep names which users know."""

FILES = sorted([*(ROOT / "engine").rglob("*.py"), *(ROOT / "api").rglob("*.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_door(module: str) -> bool:
    """A door may import anything, and nobody imports it: commands, __main__ files, the package, old names."""
    package, *rest = module.split(".")
    is_flat = package == "engine" and len(rest) <= 1 and (not rest or rest[0] not in (*GROUND, *ORDER))
    return is_flat or module.endswith(".__main__") or module in OLD_NAMES


def level(module: str) -> int:
    package, *rest = module.split(".")
    if package == "api":
        return len(ORDER) + 1
    return 0 if rest[0] in GROUND else 1 + ORDER.index(rest[0])


def imports(path: Path) -> set[str]:
    """The modules that a file imports, within functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            folder = ROOT / node.module.replace(".", "/")
            for alias in node.names:
                is_module = (folder / f"{alias.name}.py").exists() or (folder / alias.name).is_dir()
                names.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return names


def own_imports(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] in ("engine", "api")}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_downwards(path: Path) -> None:
    module = module_name(path)
    if is_door(module):
        return
    for name in own_imports(path) - {"engine"}:
        assert not is_door(name), f"{module} imports {name}, a door"
        assert level(name) <= level(module), f"{module} imports {name}, which lies above it"


def test_every_folder_has_its_place() -> None:
    folders = {path.parent.name for path in (ROOT / "engine").glob("*/__init__.py")}
    assert folders == set(ORDER)


def test_the_core_knows_nothing_of_torch() -> None:
    for path in (ROOT / "engine" / "core").glob("*.py"):
        assert "torch" not in {module.split(".")[0] for module in imports(path)}, path


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_the_library_imports_no_web_framework(path: Path) -> None:
    if module_name(path).startswith("engine"):
        roots = {module.split(".")[0] for module in imports(path)}
        assert not roots & {"fastapi", "starlette", "uvicorn", "prometheus_client", "pydantic"}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_the_api_knows_no_more_than_the_async_engine(path: Path) -> None:
    """But for the application of Ray Serve, which starts engines."""
    module = module_name(path)
    if module.startswith("api") and module != "api.ray_serve":
        known = (
            "engine.frontend.async_engine", "engine.errors", "engine.config", "engine.core.outputs",
            "engine.core.stats", "engine.core.sampling_params", "engine.core.structured_outputs", "engine.tokenizer",
            "engine.core.validation", "engine.core.limits", "engine.core.step_trace", "engine.logs",
            "engine.frontend.chat_format", "engine.frontend.tools", "engine.frontend.tool_formats",
            "engine.router.restarting", "engine.core.pooling_params",
        )  # fmt: skip
        for name in imports(path):
            if name.startswith("engine"):
                assert name.startswith(known), name


ENDPOINTS = (
    "api.completions", "api.chat", "api.embeddings", "api.tokenization", "api.anthropic", "api.responses",
)  # fmt: skip
"""Modules of endpoints, and what is theirs alone."""


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_endpoint_knows_another(path: Path) -> None:
    """They translate into `api.generation` and `api.conversation`, and out of them."""
    module = module_name(path)
    if module.startswith("api.") and module != "api.app":
        own = next((name for name in ENDPOINTS if module.startswith(name)), None)
        others = {name for name in ENDPOINTS if name != own}
        known = own_imports(path)
        assert not {name for name in known if name.startswith(tuple(others))}, module


def test_no_script_shadows_the_standard_library() -> None:
    """A script that is run by its path has its folder before everything else that is imported."""
    scripts = (ROOT / "benchmarks").glob("*.py")
    assert not {script.stem for script in scripts} & sys.stdlib_module_names
