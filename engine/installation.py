"""How the engine came onto this machine: what installs the packages of an extra, and whose `api` is imported."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from importlib.metadata import distributions
from pathlib import Path
from urllib.parse import unquote, urlsplit

from engine.errors import ConfigError

DISTRIBUTION = "llm-engine"
ROOT = Path(__file__).resolve().parent.parent
"""The directory that holds the packages `engine` and `api`: a checkout, or one that a wheel was installed into."""


def missing_package(error: ModuleNotFoundError, extra: str) -> ConfigError:
    """What to raise when a package of an extra is not there: names it, and the command that installs the extra."""
    return ConfigError(f"{error.name} is not installed: {install_command(extra)}")


def install_command(extra: str, root: Path = ROOT) -> str:
    """The command that installs an extra's packages, without an index that would have to have the engine.

    Args:
        extra: Of those in pyproject.toml.
        root: The directory of the package `engine`.
    """
    if _is_checkout(root):
        return f"pip install -e {shlex.quote(f'{root}[{extra}]')}"
    for distribution in distributions(name=DISTRIBUTION, path=[str(root)]):
        url = urlsplit(json.loads(distribution.read_text("direct_url.json") or "{}").get("url", ""))
        wheel = Path(unquote(url.path))
        if url.scheme == "file" and wheel.suffix == ".whl" and wheel.is_file():
            return f"pip install {shlex.quote(f'{wheel}[{extra}]')}"
        # The wheel is gone, but not what it says.
        packages = [
            requirement.partition(";")[0].strip()
            for requirement in distribution.requires or []
            if re.search(rf"""\bextra == ["']{re.escape(extra)}["']""", requirement)
        ]
        return f"pip install {shlex.join(packages)}"
    return f"pip install -e '.[{extra}]' in a checkout of the engine, or pip install 'WHEEL[{extra}]' with its wheel"


def _is_checkout(root: Path) -> bool:
    # Packages may also have been installed into another project's directory.
    settings = root / "pyproject.toml"
    return settings.is_file() and f'\nname = "{DISTRIBUTION}"\n' in settings.read_text()


def check_api() -> None:
    """To be called before `api` is imported, a name that other projects have, too.

    Raises:
        ConfigError: Python finds another `api` than the one beside `engine`, or none.
    """
    own = ROOT / "api"
    spec = importlib.util.find_spec("api")
    if spec is None:
        raise ConfigError(f"api: {own} is not there; install the engine as a whole")
    # A directory without __init__.py has places, and no file.
    found = Path(spec.origin or next(iter(spec.submodule_search_locations or [])))
    if found.resolve() != own / "__init__.py":
        directory = found.parent.parent if found.name == "__init__.py" else found.parent
        raise ConfigError(
            f"api: {found} hides the engine's own {own}; take {directory} off Python's path: "
            "off $PYTHONPATH, or start in another directory"
        )
