"""Proves on this machine, with a model, that a token's logits depend on nothing but its request, to the bit.

Random requests run twice: each alone, in one piece, on a cold cache; and all together in small steps over a cache
that is too small for them, so that prompts are cut into chunks, share blocks, are preempted and computed again. Every
row of logits that a token is drawn from must be the same. How each was computed is noted, and a way that never
occurred is a failure: what was not exercised was not proved.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from engine.config import EngineConfig
from engine.core.batch import Batch, Draw
from engine.core.engine_core import EngineCore
from engine.core.executor import Executor, Sampled
from engine.core.request import Request
from engine.core.sampling_params import EXAMPLES, SamplingParams
from engine.errors import EngineError
from engine.executor.cpu_executor import CpuExecutor
from engine.executor.runner import ModelRunner
from engine.executor.start import start_model
from engine.kernels import cpu
from engine.kernels.attention.in_c import SEGMENT
from engine.kernels.launch import target_of
from engine.loading.checkpoint import open_checkpoint
from engine.models.config import ModelConfig

NUM_REQUESTS = 24
NUM_ELSEWHERE = 5
"""How many of the shorter requests also run on other kernels and threads."""

SEED = 0
"""Seeds the workload: which requests there are."""

LONGEST = 384
"""Tokens of the longest sequence: more than a segment of attention on a CPU."""

MAX_TOKENS = 20

_NUCLEUS = {name: EXAMPLES[name] for name in ("top_p", "min_p")}
_FREQUENCY = {"frequency_penalty": EXAMPLES["frequency_penalty"]}
_OTHERS = {name: value for name, value in EXAMPLES.items() if name not in {**_NUCLEUS, **_FREQUENCY}}

PARAMS: tuple[SamplingParams, ...] = (
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=0),
    SamplingParams(temperature=1.0, **_NUCLEUS),
    SamplingParams(temperature=0, **_FREQUENCY),
    SamplingParams(temperature=1.2, n=2, **_OTHERS),
)
"""Between them they have every parameter that changes a draw."""

Key = tuple[int, int, int]
"""Seed, sample and position of a draw, which name a row of logits in every run; seeds differ among requests."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of the workload.

    Attributes:
        step: The number of the step before which it arrives.
        cancel_after: Its client leaves after so many tokens.
    """

    request: Request
    step: int = 0
    cancel_after: int | None = None


@dataclass(frozen=True, slots=True)
class Computed:
    """A row of logits, and how it was computed.

    Attributes:
        digest: Of its bits.
        start, size: The tokens of the sequence that the step computed.
        num_stored: Leading tokens of the sequence that came from the prefix cache.
        step_size, num_rows, num_draws: Tokens, sequences, and rows of logits of the step.
    """

    digest: bytes
    start: int
    size: int
    num_stored: int
    step_size: int
    num_rows: int
    num_draws: int

    def __str__(self) -> str:
        return (
            f"computed with {self.size} tokens from {self.start}, {self.num_stored} of the sequence from the cache, "
            f"in a step of {self.step_size} tokens of {self.num_rows} sequences"
        )

    def kinds(self, num_prompt_tokens: int) -> Iterator[str]:
        """The ways of `KINDS` that this one is an example of."""
        end = self.start + self.size
        if end > num_prompt_tokens:
            yield "decoded" if self.size == 1 else "recomputed after a preemption"
        else:
            if self.start == 0:
                yield "prompt in one piece"
            elif self.start > self.num_stored:
                yield "prompt in chunks"
                if self.size == 1:
                    yield "prompt's last token in a chunk of its own"
            if self.num_stored:
                yield "prompt with cached blocks"
        if end > SEGMENT:
            yield f"more than {SEGMENT} keys"
        if self.num_rows < self.step_size and self.num_rows > 1:
            yield "prompts and other sequences in one step"
        yield f"step of {_size_class(self.step_size)} tokens"
        yield f"step of {_size_class(self.num_draws)} draws"


def _size_class(size: int) -> str:
    """The sizes between which kernels change their form."""
    return "1" if size == 1 else "2 … 4" if size <= 4 else "5 … 15" if size < 16 else "16 or more"


KINDS = (
    "decoded",
    "prompt in one piece",
    "prompt in chunks",
    "prompt's last token in a chunk of its own",
    "prompt with cached blocks",
    "recomputed after a preemption",
    "prompts and other sequences in one step",
    f"more than {SEGMENT} keys",
    *(
        f"step of {size} {things}"
        for things in ("tokens", "draws")
        for size in ("1", "2 … 4", "5 … 15", "16 or more")
    ),
)
"""The ways of computing a row of logits that a run must have seen."""


class RecordingExecutor:
    """Runs steps as the executor within does, and notes every row of logits."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.rows: dict[Key, list[Computed]] = defaultdict(list)

    def execute(self, batch: Batch) -> torch.Tensor:
        """Runs the model: logits [rows that draw, vocabulary] float32."""
        logits = self.executor.execute(batch)
        drawing = [row for row in batch.rows if row.draw is not None]
        for row, values in zip(drawing, logits.float().cpu().numpy(), strict=True):
            draw = row.draw
            assert draw is not None
            self.rows[draw.seed, draw.index, draw.position].append(
                Computed(
                    digest=hashlib.blake2b(values.tobytes(), digest_size=16).digest(),
                    start=row.start,
                    size=len(row.token_ids),
                    num_stored=row.num_stored_tokens,
                    step_size=batch.num_tokens,
                    num_rows=len(batch.rows),
                    num_draws=len(drawing),
                )
            )
        return logits

    def sample(self, logits: torch.Tensor, batch: Batch, draws: list[Draw | None]) -> Sampled:
        """Draws a token for each row that has a draw."""
        return self.executor.sample(logits, batch, draws)


@dataclass(slots=True)
class Record:
    """What runs brought.

    Attributes:
        rows: How each row of logits was computed, once or more often.
        tokens: By seed and sample.
        num_preemptions, num_cached_tokens: Of the engine, in all.
    """

    rows: dict[Key, list[Computed]] = field(default_factory=dict)
    tokens: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    num_preemptions: int = 0
    num_cached_tokens: int = 0


class RecordedCore:
    """An engine under observation.

    Args:
        options: Of the engine, other than the configuration's.
    """

    def __init__(self, config: EngineConfig, path: Path, **options: str | int | bool | None) -> None:
        config = replace(config, **options)  # type: ignore[arg-type]
        model = start_model(config, path)
        model.executor = self._recorder = RecordingExecutor(model.executor)
        self.core = EngineCore(config, model, eos_token_ids=())
        # What is seen must not depend on what steps take.
        scheduler = self.core.scheduler
        scheduler.config = replace(scheduler.config, max_step_slowdown=None)

    @property
    def runner(self) -> ModelRunner:
        """What is on the device."""
        return self.core.model.runner

    def run(self, arrivals: Iterable[Arrival], bar: tqdm[Any] | None = None) -> Record:
        """Runs the requests together, each from its step on.

        Raises:
            EngineError: A request failed.
        """
        waiting = sorted(arrivals, key=lambda arrival: -arrival.step)
        requests = {arrival.request.request_id: arrival for arrival in waiting}
        tokens: dict[tuple[int, int], list[int]] = defaultdict(list)
        step = 0
        while waiting or self.core.has_work:
            if not self.core.has_work:
                step = max(step, waiting[-1].step)
            while waiting and waiting[-1].step <= step:
                self.core.add_request(waiting.pop().request)
            for output in self.core.step():
                if output.error is not None:
                    raise EngineError(f"request {output.request_id}: {output.error}")
                arrival = requests[output.request_id]
                drawn = tokens[arrival.request.seed, output.index]
                drawn += [token.token_id for token in output.tokens]
                if arrival.cancel_after is not None and len(drawn) >= arrival.cancel_after:
                    self.core.abort(output.request_id)
                if bar is not None and output.finish_reason is not None:
                    bar.update()
            step += 1
        stats = self.core.stats
        rows, self._recorder.rows = self._recorder.rows, defaultdict(list)
        return Record(dict(rows), dict(tokens), stats.num_preemptions, stats.prefix_cache_hits)

    def run_alone(self, arrivals: Iterable[Arrival], bar: tqdm[Any] | None = None) -> Record:
        """Runs the samples of the requests one after the other, to their ends."""
        record = Record()
        for request in (arrival.request for arrival in arrivals):
            for index in range(request.params.n):
                self.core.add_request(request)
                for other in set(range(request.params.n)) - {index}:
                    self.core.abort(request.request_id, other)
                drawn = []
                while self.core.has_work:
                    for output in self.core.step():
                        if output.error is not None:
                            raise EngineError(f"request {request.request_id}: {output.error}")
                        drawn += [token.token_id for token in output.tokens]
                record.tokens[request.seed, index] = drawn
            if bar is not None:
                bar.update()
        record.rows, self._recorder.rows = dict(self._recorder.rows), defaultdict(list)
        return record


def make_alone(config: EngineConfig, path: Path, longest: int) -> RecordedCore:
    """An engine for one sequence at a time, which computes a prompt in one piece and finds no blocks again."""
    return RecordedCore(
        config,
        path,
        max_model_len=longest,
        max_num_batched_tokens=longest,
        max_num_seqs=1,
        long_prefill_token_threshold=None,
        kv_cache_memory=None,
        enable_prefix_caching=False,
    )


def make_crowded(
    config: EngineConfig,
    path: Path,
    longest: int,
    budget: int,
    max_num_seqs: int,
    cache_bytes: int | None = None,
) -> RecordedCore:
    """An engine with so many tokens and sequences in a step; `cache_bytes` None: as much cache as they can use."""
    return RecordedCore(
        config,
        path,
        max_model_len=longest,
        max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
        long_prefill_token_threshold=None,
        kv_cache_memory=None if cache_bytes is None else str(cache_bytes),
        enable_prefix_caching=True,
    )


@dataclass(slots=True)
class Comparison:
    """Logits and tokens of runs in company beside those of each request alone.

    Attributes:
        exercised: How many rows were computed in each way of `KINDS`.
        differences: One line for each row or stream of tokens that differs.
    """

    num_rows: int = 0
    num_streams: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    exercised: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)

    def add(self, arrivals: Sequence[Arrival], alone: Record, together: Record) -> None:
        """Compares a run with the requests alone."""
        requests = {arrival.request.seed: arrival for arrival in arrivals}
        assert len(requests) == len(arrivals), "two requests of one seed"
        self.num_preemptions += together.num_preemptions
        self.num_cached_tokens += together.num_cached_tokens
        for key, results in together.rows.items():
            seed, index, position = key
            request = requests[seed].request
            expected = {result.digest for result in alone.rows.get(key, [])}
            name = f"request {request.request_id}, sample {index}, position {position}"
            for result in results:
                self.num_rows += 1
                self.exercised.update(result.kinds(len(request.prompt_token_ids)))
                if {result.digest} != expected:
                    self.differences.append(f"{name}: other logits alone than {result}")
        for (seed, index), expected_tokens in alone.tokens.items():
            self.num_streams += 1
            tokens = together.tokens.get((seed, index), [])
            size = len(expected_tokens) if requests[seed].cancel_after is None else len(tokens)
            if tokens != expected_tokens[:size]:
                name = f"request {requests[seed].request.request_id}, sample {index}"
                self.differences.append(f"{name}: alone {expected_tokens[:size]}, in company {tokens}")

    def missing(self, longest: int = LONGEST) -> list[str]:
        """The ways that did not occur, of those that sequences of at most `longest` tokens allow."""
        beyond = f"more than {SEGMENT} keys"
        missing = [
            kind for kind in KINDS if not self.exercised[kind] and (kind != beyond or longest > SEGMENT)
        ]
        if not self.num_preemptions:
            missing.append("preemptions")
        if not self.num_cached_tokens:
            missing.append("tokens from the prefix cache")
        return missing


def make_arrivals(
    source: random.Random, count: int, vocab_size: int, longest: int = LONGEST
) -> list[Arrival]:
    """Random requests: some beginnings are shared, a few are long, some clients leave early."""
    beginnings = [_random_tokens(source, longest, vocab_size) for _ in range(3)]
    arrivals = []
    for number in range(count):
        size = source.randrange(
            *source.choice([(1, 24), (8, 64), (8, 64), (40, 120), (SEGMENT + 4, LONGEST)])
        )
        size = min(size, longest - MAX_TOKENS)
        # A prompt that is all shared and one that is not are both among them.
        shared = min(size, source.choice([0, source.randrange(longest), longest]))
        prompt = source.choice(beginnings)[:shared] + _random_tokens(source, size - shared, vocab_size)
        max_tokens = source.randrange(1, MAX_TOKENS + 1)
        params = replace(PARAMS[number % len(PARAMS)], max_tokens=max_tokens, ignore_eos=True)
        request = Request(
            request_id=str(number),
            prompt_token_ids=prompt,
            params=params,
            seed=number,
            priority=source.randrange(2),
        )
        cancel_after = source.randrange(1, max_tokens + 1) if number % 8 == 7 else None
        arrivals.append(Arrival(request, source.randrange(1 + count // 3), cancel_after))
    return arrivals


def _random_tokens(source: random.Random, count: int, vocab_size: int) -> list[int]:
    return [source.randrange(vocab_size) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Round:
    """A run of all requests together.

    Attributes:
        budget: Tokens of a step.
        is_scarce: Whether there are no more blocks than the longest sequence needs.
    """

    budget: int
    max_num_seqs: int
    is_scarce: bool


ROUNDS = (
    Round(budget=224, max_num_seqs=24, is_scarce=False),
    Round(budget=24, max_num_seqs=12, is_scarce=True),
)
"""Large steps and much cache; small ones, and so little cache that sequences are preempted."""


def longest_sequence(config: EngineConfig, path: Path) -> int:
    """Tokens of the workload's longest sequence: what it wants, or what the model has."""
    model = ModelConfig.from_dict(open_checkpoint(path).config)
    return min(LONGEST, model.max_position_embeddings, config.max_model_len or LONGEST)


class Trial:
    """The comparison for one configuration.

    Attributes:
        arrivals: The workload.
        alone: The engine for one request at a time.
        record: What it brought.
    """

    def __init__(self, config: EngineConfig, path: Path, num_requests: int = NUM_REQUESTS) -> None:
        self.config, self.path = config, path
        self.longest = longest_sequence(config, path)
        self.alone = make_alone(config, path, self.longest)
        vocab_size = self.alone.core.info.vocab_size
        self.arrivals = make_arrivals(random.Random(SEED), num_requests, vocab_size, self.longest)
        self.record = Record()

    def run(self, rounds: Sequence[Round] = ROUNDS, quiet: bool = False) -> Comparison:
        """Runs every request alone and all together, once a round."""
        comparison = Comparison()
        total = sum(1 + arrival.request.params.n * len(rounds) for arrival in self.arrivals)
        with tqdm(total=total, desc="Requests alone", unit="run", disable=quiet, leave=False) as bar:
            self.record = self.alone.run_alone(self.arrivals, bar)
            for number, plan in enumerate(rounds, 1):
                bar.set_description(f"Together, {number} of {len(rounds)}")
                together = self.crowded(plan).run(self.arrivals, bar)
                comparison.add(self.arrivals, self.record, together)
        return comparison

    def crowded(self, plan: Round) -> RecordedCore:
        """An engine for the round."""
        # The other engine has as much as one sequence can use.
        cache_bytes = self.alone.runner.plan.kv_cache if plan.is_scarce else None
        return make_crowded(self.config, self.path, self.longest, plan.budget, plan.max_num_seqs, cache_bytes)


def digests(config: EngineConfig, path: Path, num_requests: int = NUM_REQUESTS) -> dict[str, list[str]]:
    """What a few requests of `Trial` bring in company, in this process; see `readable`."""
    longest, plan = longest_sequence(config, path), ROUNDS[0]
    crowded = make_crowded(config, path, longest, plan.budget, plan.max_num_seqs)
    arrivals = make_arrivals(random.Random(SEED), num_requests, crowded.core.info.vocab_size, longest)
    arrivals.sort(key=lambda arrival: len(arrival.request.prompt_token_ids))
    return readable(crowded.run(arrivals[num_requests // 2 :][:NUM_ELSEWHERE]))


def readable(record: Record) -> dict[str, list[str]]:
    """Digests of logits by seed, sample and position, and tokens by seed and sample, as JSON takes them."""
    rows = {
        " ".join(map(str, key)): sorted({r.digest.hex() for r in rows}) for key, rows in record.rows.items()
    }
    tokens = {" ".join(map(str, key)): list(map(str, tokens)) for key, tokens in record.tokens.items()}
    return rows | tokens


def promise(config: EngineConfig, runner: ModelRunner) -> tuple[bool, str]:
    """Whether equality to the bit is promised, and of which kernels."""
    if target_of(torch.empty(0, device=runner.device)) is not None:
        kernels = (
            f"Triton's kernels on {torch.cuda.get_device_name() if torch.cuda.is_available() else 'a CPU'}"
        )
        if config.batch_invariant_attention:
            return True, kernels
        return False, f"{kernels}: only --quant int8 and --deterministic fix the form of float products"
    if isinstance(runner.executor, CpuExecutor):
        return True, cpu.describe()
    if cpu.library() is None:
        return False, cpu.describe()
    return False, f"torch's operators, whose sums depend on the batch for {config.dtype}: use --dtype float32"
