"""From a wheel and from a checkout: what is in it, what it says is missing, and whose `api` it takes."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine import logs, serve
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executor.ranks.ranks import _launcher
from engine.installation import install_command
from engine.quality.report import check_plotting

ROOT = Path(__file__).parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
DATA = ("kernels/cpu/*.c", "kernels/cpu/*.h", "kernels/tiles/*.json")


@dataclass(frozen=True)
class Installation:
    """A copy of the sources, the wheel that was built of it, and where that is installed."""

    checkout: Path
    wheel: Path
    directory: Path

    def python(self, *arguments: str, before: tuple[Path, ...] = (), cwd: Path | None = None) -> Outcome:
        """Runs Python with what is installed, and perhaps directories before it on the path."""
        path = os.pathsep.join(map(str, [*before, self.directory]))
        result = subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, "PYTHONPATH": path},
            cwd=cwd or self.directory.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        return result.returncode, result.stdout, result.stderr


Outcome = tuple[int, str, str]
"""Exit status, output and errors."""


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    subprocess.run(command, check=True)


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    root = tmp_path_factory.mktemp("installation")
    # The build writes beside what it reads.
    checkout = root / "a checkout"
    ignored = shutil.ignore_patterns("__pycache__")
    for package in ("engine", "api"):
        shutil.copytree(ROOT / package, checkout / package, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, checkout)
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(root / "wheels"), str(checkout))
    (wheel,) = (root / "wheels").iterdir()
    directory = root / "installed"
    pip("install", "--no-deps", "--no-index", "--target", str(directory), str(wheel))
    return Installation(checkout, wheel, directory)


def accepts(command: str) -> bool:
    """Whether pip understands a command, as a shell would pass it on."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    options = "--disable-pip-version-check --dry-run --no-index --no-deps"
    if " -e " in command:
        options += " --no-build-isolation"
    return subprocess.run(f"{command} {options}", shell=True, env=environment, check=False).returncode == 0


def test_everything_is_in_the_wheel(installation: Installation) -> None:
    def files(root: Path) -> set[str]:
        paths = [
            *(path for package in ("engine", "api") for path in (root / package).rglob("*.py")),
            *(path for pattern in DATA for path in (root / "engine").glob(pattern)),
        ]
        return {str(path.relative_to(root)) for path in paths}

    expected = files(ROOT)
    assert {Path(name).suffix for name in expected} == {".py", ".c", ".h", ".json"}
    assert files(installation.directory) == expected


def test_it_plans_an_engine_elsewhere(installation: Installation, tmp_path: Path) -> None:
    code = "import engine; print(engine.__file__)"
    assert installation.python("-c", code)[1] == f"{installation.directory / 'engine' / '__init__.py'}\n"
    status, output, errors = installation.python(
        "-m", "engine.plan", "--model", "llama", "--quant", "int8", "--device", "cpu", cwd=tmp_path
    )
    assert status == 0, errors
    assert output.startswith("llama: quant int8")


FOREIGN = {"package": "api/__init__.py", "module": "api.py"}


def make_foreign(directory: Path, kind: str) -> Path:
    file = directory / FOREIGN[kind]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("raise SystemExit('another program')\n")
    return file


def refusal(installation: Installation, foreign: Path, directory: Path) -> str:
    return (
        f"ConfigError: api: {foreign} hides the engine's own {installation.directory / 'api'}; "
        f"take {directory} off Python's path: off $PYTHONPATH, or start in another directory"
    )


@pytest.mark.parametrize("kind", FOREIGN)
def test_another_api_is_named(installation: Installation, tmp_path: Path, kind: str) -> None:
    foreign = make_foreign(tmp_path, kind)
    expected = 1, "", refusal(installation, foreign, tmp_path) + "\n"
    assert installation.python("-m", "engine.serve", before=(tmp_path,)) == expected
    # Where a command starts comes before $PYTHONPATH.
    assert installation.python("-m", "engine.serve", cwd=tmp_path) == expected


def test_ray_serve_is_not_given_another_api(installation: Installation, tmp_path: Path) -> None:
    foreign = make_foreign(tmp_path, "package")
    status, _, errors = installation.python("-c", "import engine.parallel.ray_serve", before=(tmp_path,))
    assert status == 1
    assert errors.splitlines()[-1] == f"engine.errors.{refusal(installation, foreign, tmp_path)}"


def test_a_directory_without_code_hides_nothing(installation: Installation, tmp_path: Path) -> None:
    (tmp_path / "api").mkdir()
    code = "from engine.installation import check_api; check_api(); import api; print(api.__file__)"
    own = installation.directory / "api" / "__init__.py"
    assert installation.python("-c", code, before=(tmp_path,)) == (0, f"{own}\n", "")


def test_an_engine_without_its_api_says_so(installation: Installation, tmp_path: Path) -> None:
    shutil.copytree(installation.directory / "engine", tmp_path / "engine")
    code = "from engine.serve import main; raise SystemExit(main([]))"
    # Isolated from what this environment has installed.
    status, _, errors = installation.python(
        "-S", "-c", f"import sys; sys.path[:] = [{str(tmp_path)!r}, *sys.path[2:]]; {code}"
    )
    assert status == 1
    assert errors == f"ConfigError: api: {tmp_path / 'api'} is not there; install the engine as a whole\n"


def test_the_advice_can_be_followed(installation: Installation, tmp_path: Path) -> None:
    command = install_command("serve", installation.checkout)
    assert command == f"pip install -e '{installation.checkout}[serve]'"
    assert accepts(command)
    command = install_command("serve", installation.directory)
    assert command == f"pip install '{installation.wheel}[serve]'"
    assert accepts(command)
    # As it is when the wheel has gone.
    (metadata,) = installation.directory.glob("*.dist-info")
    shutil.copytree(metadata, tmp_path / metadata.name)
    (tmp_path / metadata.name / "direct_url.json").unlink()
    for extra, packages in EXTRAS.items():
        command = install_command(extra, tmp_path)
        words = shlex.split(command.removeprefix("pip install "))
        assert sorted(words) == sorted(packages)
    assert accepts(install_command("serve", tmp_path))


def test_a_copy_that_knows_nothing_names_both_ways(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "of-another-project"\n')
    command = install_command("ray", tmp_path)
    assert "pip install -e '.[ray]' in a checkout" in command
    assert "pip install 'WHEEL[ray]'" in command


def test_what_is_missing_is_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in ("uvloop", "matplotlib", "ray"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "engine.executor.ranks.ray_ranks", raising=False)
    monkeypatch.setattr(logs, "configure", lambda *_: None)
    assert serve.main([]) == 1
    assert caplog.messages == [f"ConfigError: uvloop is not installed: {install_command('serve')}"]
    with pytest.raises(ConfigError) as refused:
        check_plotting()
    assert str(refused.value) == f"matplotlib is not installed: {install_command('quality')}"
    with pytest.raises(ConfigError) as refused:
        _launcher(EngineConfig(distributed_executor_backend="ray"))
    assert str(refused.value) == f"ray is not installed: {install_command('ray')}"


def test_no_advice_names_a_distribution_that_nobody_published() -> None:
    papers = [path for name in ("README.md", "CONTRIBUTING.md", "*/*.md") for path in ROOT.glob(name)]
    sources = [path for package in ("engine", "api", "benchmarks") for path in (ROOT / package).rglob("*.py")]
    assert [str(path) for path in papers + sources if "llm-engine[" in path.read_text()] == []
