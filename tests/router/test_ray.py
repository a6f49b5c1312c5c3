"""Ray: ranks on the nodes of a cluster, and replicas behind one endpoint; both nodes are this machine."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import torch
import zmq

from engine import LLM, SamplingParams
from engine.config import EngineConfig
from engine.errors import ConfigError, RankFailedError
from engine.executor.ranks.launching import Link
from engine.executor.ranks.ranks import launch
from engine.loading.checkpoint import open_checkpoint
from engine.tokenizer.files import byte_tokenizer
from tests.helpers.paged import make_runner, make_sequences, run_chunks
from tests.helpers.prompts import PROMPTS
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint

ray = pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")
pytest.importorskip("ray.serve", reason="ray[serve] is not installed: pip install '.[ray]'")

from api import ray_serve  # noqa: E402
from engine.executor.ranks.ray_ranks import RayLauncher  # noqa: E402
from engine.router.replicas import STATS_SECONDS  # noqa: E402
from tests.helpers.round_robin import RoundRobinRouter  # noqa: E402

pytestmark = pytest.mark.process

CHUNKS = [[40, 1, 1], [17, 20, 1], [1, 1, 1]]
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of two CPUs each; programs that ask for "auto" find them."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "object_store_memory": 100 << 20, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        nodes = Cluster(initialize_head=True, head_node_args=node)
        nodes.add_node(num_cpus=2, object_store_memory=100 << 20)
        patch.setenv("RAY_ADDRESS", nodes.address)
        try:
            yield nodes
        finally:
            ray.shutdown()
            nodes.shutdown()


def processes(title: str) -> list[psutil.Process]:
    """Those of actors, which Ray titles by their classes."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if " ".join(process.info["cmdline"] or []).startswith(title)
    ]


def until_gone(actors: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(actors, timeout=20)
    assert not alive


def nodes_of_bundles() -> list[str]:
    """Of the one placement group that there is."""
    groups = ray.util.placement_group_table().values()
    (nodes,) = (group["bundles_to_node_id"] for group in groups if group["state"] == "CREATED")
    return [nodes[bundle] for bundle in sorted(nodes)]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    config = deepcopy(TINY_CONFIGS["smollm2"])
    config.intermediate_size = 96  # is shared by three, too
    write_checkpoint(tmp_path, config)
    return tmp_path


def tiny_options(path: Path, **others: Any) -> EngineConfig:
    return EngineConfig.from_options(
        model=str(path),
        dtype="float32",
        device="cpu",
        quant="int8",
        kv_cache_memory="4MiB",
        num_threads=1,
        tensor_parallel_size=3,
        distributed_executor_backend="ray",
        **others,
    )


def test_without_a_cluster_it_is_said_how_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comes first: a cluster of this machine would be found."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="ray start --head"):
        RayLauncher(2, 1, "cpu")


def test_a_cluster_that_is_gone_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    began = time.monotonic()
    with pytest.raises(ConfigError, match=rf"finds no cluster at [\d.]+:{port}; run ray start --head"):
        RayLauncher(2, 1, "cpu")
    assert time.monotonic() - began < 30  # Ray itself would take minutes
    assert not ray.is_initialized()


def test_ranks_on_two_nodes_compute_the_bits_of_one(cluster: Any, tiny: Path) -> None:
    alone = make_runner(tiny, quant="int8")
    sequences = make_sequences(alone.model_config.vocab_size, CHUNKS)
    expected = run_chunks(alone, sequences, CHUNKS)
    runner, steps, ranks = launch(tiny_options(tiny), open_checkpoint(tiny), tiny)
    assert ranks is not None
    try:
        assert len(set(nodes_of_bundles())) == 2
        actors = processes("ray::RankActor")
        assert len(actors) == 2
        together = SimpleNamespace(cache=runner.cache, plan=runner.plan, execute=steps.execute)
        computed = run_chunks(together, sequences, CHUNKS)
    finally:
        ranks.close()
    for one, several in zip(expected, computed, strict=True):
        for position, logits in one.items():
            assert torch.equal(logits, several[position])
    assert not ray.is_initialized()
    until_gone(actors)


def node_of(actor: psutil.Process) -> str:
    """The node whose raylet has started it."""
    raylet = actor.parent()
    assert raylet is not None
    names = {f"--raylet_socket_name={node['RayletSocketName']}": node["NodeID"] for node in ray.nodes()}
    (name,) = names.keys() & raylet.cmdline()
    return str(names[name])


def stage_of(actor: psutil.Process) -> int:
    """Which stage's weights it has mapped."""
    stages = {
        match[1] for file in actor.memory_maps() if (match := re.search(r"-stage-(\d+)-of-", file.path))
    }
    (stage,) = stages
    return int(stage)


@pytest.mark.slow
def test_stages_are_on_several_nodes_and_the_ranks_of_each_on_one(cluster: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY_CONFIGS["llama"])
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    options: dict[str, Any] = {"quant": "int8", "kv_cache_memory": "4MiB", "num_threads": 1}
    prompts = [[(7 * index + place) % 300 + 3 for place in range(10 + index)] for index in range(6)]
    params = [replace(GREEDY, temperature=0.9 * (index % 2), seed=index) for index in range(6)]

    def generate(llm: LLM) -> list[list[int]]:
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]

    with closing(LLM(str(tmp_path), **options)) as alone:
        expected = generate(alone)
    options |= {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "distributed_executor_backend": "ray"}
    # The first start writes what the second one maps.
    LLM(str(tmp_path), **options).close()
    with closing(LLM(str(tmp_path), **options)) as shared:
        first, second = nodes_of_bundles()
        assert first == ray.get_runtime_context().get_node_id() != second
        # Rank 0 is this process, on the first node.
        seats = sorted((stage_of(actor), node_of(actor)) for actor in processes("ray::RankActor"))
        assert seats == [(0, first), (1, second), (1, second)]
        assert generate(shared) == expected


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_is_named_and_all_end(
    number: signal.Signals, cluster: Any, tiny: Path
) -> None:
    runner, steps, ranks = launch(tiny_options(tiny), open_checkpoint(tiny), tiny)
    assert ranks is not None
    sequences = make_sequences(runner.model_config.vocab_size, CHUNKS)
    together = SimpleNamespace(cache=runner.cache, plan=runner.plan, execute=steps.execute)
    actors = processes("ray::RankActor")

    def run_forever() -> None:
        for admission in count(1):
            run_chunks(together, sequences, CHUNKS, admission)

    try:
        run_chunks(together, sequences, CHUNKS)
        began = time.monotonic()
        actors[0].send_signal(number)
        with pytest.raises(RankFailedError, match=r"rank [12]"):
            run_forever()
        assert time.monotonic() - began < 10
    finally:
        ranks.close()
    until_gone(actors)


@pytest.mark.slow
def test_only_who_has_the_link_is_heard(cluster: Any) -> None:
    launcher = RayLauncher(2, 1, "cpu")
    with zmq.Context() as context, context.socket(zmq.PULL) as reports:
        link = launcher.bind(reports, "reports")
        public, secret = zmq.curve_keypair()
        links = [
            Link(link.address),
            Link(link.address, public, public, secret),
            Link(link.address, link.server_key, link.public_key, link.secret_key),
        ]
        senders = [context.socket(zmq.PUSH) for _ in links]
        for number, sender in enumerate(senders):
            sender.linger = 0
            links[number].connect(sender)
            sender.send(b"%d" % number)
        assert reports.recv() == b"2"
        assert not reports.poll(1000)
        for sender in senders:
            sender.close()
    launcher.close()


@pytest.mark.slow
def test_a_cluster_without_room_is_refused(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.executor.ranks.ray_ranks.PLACEMENT_SECONDS", 1.0)
    with pytest.raises(ConfigError, match=r"9 ranks need 1 CPU each.* 4 CPU free"):
        RayLauncher(9, 3, "cpu")
    assert not ray.is_initialized()


@pytest.mark.slow
def test_smollm2_generates_the_same_tokens(cluster: Any) -> None:
    options: dict[str, Any] = {"quant": "int8", "kv_cache_memory": "64MiB"}
    with closing(LLM("llama", **options)) as alone:
        expected = [output.outputs[0].token_ids for output in alone.generate(PROMPTS[:8], GREEDY)]
    with closing(
        LLM("llama", tensor_parallel_size=3, distributed_executor_backend="ray", **options)
    ) as shared:
        computed = [output.outputs[0].token_ids for output in shared.generate(PROMPTS[:8], GREEDY)]
    assert computed == expected


@contextmanager
def deployed(cluster: Any, **arguments: str) -> Iterator[str]:
    """The address of replicas of SmolLM2 in int8 behind one endpoint."""
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        defaults = {"model": "llama", "quant": "int8", "num_threads": "1", "kv_cache_memory": "32MiB"}
        serve.run(ray_serve.build({**defaults, **arguments}), name="llm")
        address = f"http://127.0.0.1:{port}"
        until(lambda: httpx.get(f"{address}/health").status_code == 200)
        yield address
    finally:
        serve.shutdown()
        ray.shutdown()


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def metric(address: str, name: str) -> float:
    time.sleep(2 * STATS_SECONDS)  # how old the ingress's counts may be
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(f"engine_{name}{{")))


async def complete(client: httpx.AsyncClient, **request: Any) -> dict[int, list[int]]:
    """The tokens of each sample of a streamed completion, which must end well."""
    tokens: dict[int, list[int]] = {}
    reasons: dict[int, str | None] = {}
    body = {"stream": True, "return_token_ids": True, **request}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            assert "choices" in chunk, chunk
            for choice in chunk["choices"]:
                tokens.setdefault(choice["index"], []).extend(choice["token_ids"])
                reasons[choice["index"]] = choice["finish_reason"]
    assert all(reason in ("stop", "length") for reason in reasons.values())
    return tokens


def hit_rate(address: str) -> float:
    """Of 70 requests in 14 groups: the first 128 tokens of a prompt are its group's, the other 32 its own."""
    source = random.Random(0)
    prefixes = [[source.randrange(1000, 40000) for _ in range(128)] for _ in range(14)]
    requests = []
    for _ in range(5):
        source.shuffle(prefixes)
        requests += [prefix + [source.randrange(1000, 40000) for _ in range(32)] for prefix in prefixes]

    async def send() -> None:
        async with httpx.AsyncClient(base_url=address, timeout=120) as client:
            for first, second in zip(requests[::2], requests[1::2], strict=True):
                await asyncio.gather(
                    *(complete(client, prompt=prompt, max_tokens=4) for prompt in (first, second))
                )

    asyncio.run(send())
    hits, queries = metric(address, "prefix_cache_hits_total"), metric(address, "prefix_cache_queries_total")
    assert queries == sum(map(len, requests))
    return hits / queries


@pytest.mark.slow
def test_prefixes_are_found_twice_as_often_as_in_turns(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each replica's cache has room for 85 blocks; requests of 7 groups fill 77, of 14 groups 154."""
    with deployed(cluster, replicas="2", kv_cache_memory="16MiB") as address:
        by_prefix = hit_rate(address)
    monkeypatch.setattr(ray_serve, "PrefixRouter", RoundRobinRouter)
    with deployed(cluster, replicas="2", kv_cache_memory="16MiB") as address:
        in_turns = hit_rate(address)
    print(f"prefix cache hits: {by_prefix:.1%} by prefix, {in_turns:.1%} in turns")
    assert by_prefix > 0.5
    assert by_prefix >= 2 * in_turns


LOAD: list[dict[str, Any]] = [
    {"prompt": prompt, "max_tokens": 240, "ignore_eos": True, "seed": number, **options}
    for number, (prompt, options) in enumerate(
        zip(
            PROMPTS,
            [
                {"temperature": 0},
                {"temperature": 0.8},
                {"temperature": 0.9, "n": 2},
                {"temperature": 0, "repetition_penalty": 1.2},
                {"temperature": 0, "stop": ["\n\n"], "min_tokens": 200},
                {"temperature": 1.0, "top_p": 0.9, "frequency_penalty": 0.4},
                {"temperature": 0, "logprobs": 1},
                {"temperature": 0.7},
            ],
            strict=False,
        )
    )
]


@pytest.mark.slow
def test_a_replica_that_dies_loses_no_request_and_changes_no_token(cluster: Any) -> None:
    async def run(address: str, disturb: Callable[[], None]) -> list[dict[int, list[int]]]:
        async with httpx.AsyncClient(base_url=address, timeout=120) as client:
            tasks = [asyncio.create_task(complete(client, **request)) for request in LOAD]
            await asyncio.sleep(1.5)
            assert not any(task.done() for task in tasks)
            await asyncio.to_thread(disturb)
            return await asyncio.gather(*tasks)

    def replicas() -> list[psutil.Process]:
        return processes("ray::ServeReplica:llm:Replica")

    with deployed(cluster, replicas="2") as address:
        expected = asyncio.run(run(address, lambda: None))
        # The actor, and then the engine's own process under another.
        for victim in (lambda: replicas()[0], lambda: replicas()[0].children()[0]):
            until(lambda: len(replicas()) == 2 and all(one.children() for one in replicas()))
            killed = victim()
            assert asyncio.run(run(address, killed.kill)) == expected
            killed.wait(60)
        assert httpx.get(f"{address}/health").status_code == 200


@pytest.mark.slow
def test_who_hangs_up_frees_the_replica(cluster: Any) -> None:
    body = {"prompt": "Once", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with deployed(cluster) as address:
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()  # closes the response when it is dropped
            next(lines)
            assert metric(address, "num_requests_running") == 1
        assert metric(address, "num_requests_running") == 0
        assert metric(address, "generation_tokens_total") < 1900


@pytest.mark.slow
def test_replicas_are_added_while_tokens_wait(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(address: str) -> int:
        most = 0
        async with httpx.AsyncClient(base_url=address, timeout=120) as client:
            request = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True}
            tasks = [asyncio.create_task(complete(client, **request)) for _ in range(4)]
            while not all(task.done() for task in tasks):
                most = max(most, len(processes("ray::ServeReplica:llm:Replica")))
                await asyncio.sleep(0.2)
            await asyncio.gather(*tasks)
        return most

    scaling = partial(
        ray_serve.AutoscalingConfig, upscale_delay_s=1, look_back_period_s=3, metrics_interval_s=1
    )
    monkeypatch.setattr(ray_serve, "AutoscalingConfig", scaling)
    with deployed(cluster, max_replicas="2", target_queued_tokens="100") as address:
        assert len(processes("ray::ServeReplica:llm:Replica")) == 1
        assert asyncio.run(run(address)) == 2
