"""Ranks on two hosts, which are network namespaces of this machine with a link of a millisecond between them."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from engine import LLM, EngineConfig, SamplingParams
from engine.errors import EngineDeadError
from engine.executor.ranks import rank_process
from engine.frontend.async_engine import AsyncEngine
from engine.tokenizer.files import byte_tokenizer
from tests.executor.ranks.test_failures import DETECTION_SECONDS, run, started, until
from tests.helpers.paged import make_runner, make_sequences, run_chunks
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint

ROOT = Path(__file__).parents[3]

ISOLATED = ("unshare", "-rnp", "--mount-proc", "--fork", "--kill-child")
"""Runs a command in namespaces of its own, of which it is root. All processes there end with it."""

OPTIONS: dict[str, Any] = {
    "quant": "int8",
    "dtype": "float32",
    "device": "cpu",
    "kv_cache_memory": "4MiB",
    "num_threads": 1,
    "max_num_batched_tokens": 16,
    "max_num_seqs": 4,
}
"""Prompts come in chunks, and wait for each other."""

PROMPTS = [[(7 * index + place) % 300 + 3 for place in range(10 + index)] for index in range(6)]
PARAMS = [
    SamplingParams(max_tokens=24, temperature=0.9 * (index % 2), seed=index, logprobs=20, ignore_eos=True)
    for index in range(6)
]
LONG = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)

RANK = re.compile(rf"{re.escape(rank_process.__name__)}|^ray::RankActor")
"""Is found in the command of a rank's process, or in what Ray makes of it."""

Drawn = tuple[list[int], list[Any]]
"""Tokens, and the log-probabilities of these and of the likeliest."""


@pytest.fixture(scope="module", autouse=True)
def isolation() -> None:
    status, output = subprocess.getstatusoutput(shlex.join((*ISOLATED, "ip", "link", "add", "type", "veth")))
    if status != 0:
        pytest.skip(f"there are no network namespaces here: {output}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path, TINY_CONFIGS["llama"])
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def expected(model: Path) -> list[Drawn]:
    """What one rank draws."""
    with closing(LLM(str(model), **OPTIONS)) as alone:
        results = alone.generate(PROMPTS, PARAMS, use_tqdm=False)
    return [(output.token_ids, output.logprobs or []) for (output,) in (result.outputs for result in results)]


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Temporary files go where paths are short, since those of sockets must be."""
    monkeypatch.chdir(ROOT)
    with tempfile.TemporaryDirectory() as directory:
        monkeypatch.setenv("TMPDIR", directory)
        monkeypatch.setattr("tempfile.tempdir", None)
        yield


def script(*arguments: str) -> tuple[str, ...]:
    return (*ISOLATED, sys.executable, "-m", "tests.helpers.two_hosts", *arguments)


def test_logits_are_those_of_one_rank_to_the_bit(model: Path, tmp_path: Path) -> None:
    alone = make_runner(model, quant="int8")
    sequences = make_sequences(alone.model_config.vocab_size)
    out = tmp_path / "logits"
    with subprocess.Popen(script("logits", str(model), str(out)), cwd=ROOT, stdin=subprocess.PIPE) as child:
        assert child.wait() == 0
    for one, several in zip(run_chunks(alone, sequences), torch.load(out), strict=True):
        for position, logits in one.items():
            assert torch.equal(logits, several[position])


@dataclass
class Hosts:
    """The hosts of an engine that was started last, from outside.

    Attributes:
        processes: All of both.
        ranks: Those of ranks.
    """

    processes: list[psutil.Process]
    ranks: list[psutil.Process]

    @classmethod
    def find(cls) -> Hosts:
        outermost = max(psutil.Process().children(), key=lambda child: child.create_time())
        processes = outermost.children(recursive=True)
        return cls(processes, [processes[0], *(one for one in processes if RANK.search(command(one)))])

    def kill_rank(self) -> None:
        self.ranks[1].kill()

    def cut_link(self) -> None:
        enter = ("nsenter", "--user", "--preserve-credentials", "--net", "--target", str(self.ranks[0].pid))
        subprocess.run((*enter, "ip", "link", "set", "near", "down"), check=True)

    def check_gone(self) -> None:
        _, left = psutil.wait_procs(self.processes, timeout=5)
        assert not left


def command(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def network(process: psutil.Process) -> str:
    return os.readlink(f"/proc/{process.pid}/ns/net")


async def collect(engine: AsyncEngine, prompt: list[int], params: SamplingParams, name: str) -> Drawn:
    token_ids: list[int] = []
    logprobs: list[Any] = []
    async for output in engine.generate(prompt, params, name):
        for sample in output.outputs:
            token_ids += sample.token_ids
            logprobs += sample.logprobs or []
    return token_ids, logprobs


@pytest.mark.usefixtures("surroundings")
@pytest.mark.parametrize(
    ("backend", "tensor", "pipeline", "strike", "cause"),
    [
        ("mp", 1, 2, Hosts.kill_rank, "was killed by SIGKILL"),
        pytest.param("mp", 2, 1, Hosts.cut_link, "has been silent for 5 s", marks=pytest.mark.slow),
        pytest.param("mp", 2, 1, Hosts.kill_rank, "was killed by SIGKILL", marks=pytest.mark.slow),
        pytest.param("mp", 1, 2, Hosts.cut_link, "has been silent for 5 s", marks=pytest.mark.slow),
        pytest.param("ray", 2, 1, Hosts.kill_rank, "has lost its actor: ", marks=pytest.mark.slow),
        pytest.param("ray", 1, 2, Hosts.cut_link, "has been silent for 5 s", marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_one_rank_until_one_is_lost(
    backend: str,
    tensor: int,
    pipeline: int,
    strike: Callable[[Hosts], None],
    cause: str,
    model: Path,
    expected: list[Drawn],
) -> None:
    if backend == "ray":
        pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")
    config = EngineConfig.from_options(
        model=str(model),
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        distributed_executor_backend=backend,
        **OPTIONS,
    )

    async def check() -> None:
        async with started(config=config, command=script(backend)) as engine:
            hosts = Hosts.find()
            assert len(hosts.ranks) == 2
            assert len({network(rank) for rank in hosts.ranks}) == 2
            requests = enumerate(zip(PROMPTS, PARAMS, strict=True))
            drawn = [collect(engine, prompt, params, f"{i}") for i, (prompt, params) in requests]
            assert await asyncio.gather(*drawn) == expected
            streams = [
                asyncio.create_task(collect(engine, prompt, LONG, f"{i}")) for i, prompt in enumerate(PROMPTS)
            ]
            await until(lambda: engine.stats.num_requests_running == 4)
            began = time.monotonic()
            strike(hosts)
            results = await asyncio.gather(*streams, return_exceptions=True)
            seconds = time.monotonic() - began
            print(f"{strike.__name__}: {seconds:.2f} s: {engine.error}")
            assert seconds < DETECTION_SECONDS
            assert engine.error is not None
            assert engine.error.startswith(f"rank 1 {cause}")
            assert engine.error.split()[-2] == "step"
            assert all(isinstance(error, EngineDeadError) for error in results)
            assert {str(error) for error in results} == {engine.error}
        await asyncio.to_thread(hosts.check_gone)

    run(check())
