"""Twice as many requests as can be served: the real scheduler and admission, over a simulated clock.

What steps take was recorded once, of SmolLM2-135M under int8 (`python -m benchmarks.step_costs`): step_costs.json
says on which machine and when. A simulated step takes what a recorded one of nearly its cost did, in proportion to
what the two compute, so that it is as noisy and as little linear as they were.
"""

from __future__ import annotations

import json
import random
from bisect import bisect
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from api.admission import Admission, Place, QueueLimits
from api.errors import ApiError
from engine.config import EngineConfig
from engine.core.batch import Batch, Draw
from engine.core.engine_core import EngineCore
from engine.core.executor import Drawn, ModelFacts
from engine.core.request import Request, SampledToken
from engine.core.sampling_params import SamplingParams
from engine.core.step_costs import StepCosts, StepSize

TTFT_SECONDS, ITL_SECONDS = 5.0, 0.2
SUSTAINABLE = 1.2
"""Requests a second, of which some are refused already: arrivals come in bunches."""

NEIGHBOURS = 8
"""A step takes what one of so many took that cost a little less, or as many that cost a little more."""


class RecordedSteps:
    """What steps took."""

    def __init__(self) -> None:
        recorded = json.loads(Path(__file__).with_name("step_costs.json").read_text())["steps"]
        sizes = [StepSize(*map(int, parts)) for *parts, _ in recorded]
        seconds = np.array([milliseconds / 1e3 for *_, milliseconds in recorded])
        parts = np.array([(1, one.num_prompt_tokens, one.num_decodes, one.num_reads) for one in sizes], float)
        # Errors count relative to what a step took.
        prices = np.linalg.lstsq(parts / seconds[:, None], np.ones(len(sizes)), rcond=None)[0]
        self.costs = StepCosts(*(max(0.0, float(price)) for price in prices))
        pairs = sorted((self.costs.seconds(size), took) for size, took in zip(sizes, seconds, strict=True))
        self._costs = [cost for cost, _ in pairs]
        self._ratios = [float(took / cost) for cost, took in pairs]

    def seconds(self, size: StepSize, rng: random.Random) -> float:
        cost = self.costs.seconds(size)
        place = bisect(self._costs, cost) + rng.randrange(-NEIGHBOURS, NEIGHBOURS)
        return cost * self._ratios[min(max(place, 0), len(self._ratios) - 1)]


STEPS = RecordedSteps()


class SimulatedExecutor:
    """Steps that take what recorded ones took, by a clock that nothing else moves."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self._rng = random.Random(seed)

    def execute(self, batch: Batch) -> str:
        size = StepSize.of((row.start, row.start + len(row.token_ids)) for row in batch.rows)
        self.now += STEPS.seconds(size, self._rng)
        return "logits"

    def sample(self, logits: str, batch: Batch, draws: list[Draw | None]) -> Drawn:
        return Drawn([None if draw is None else SampledToken(1) for draw in draws])


@dataclass
class SimulatedModel:
    executor: SimulatedExecutor
    facts: ModelFacts
    fatal = ()
    num_compilations = 0

    def progress(self) -> None:
        return None

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class Served:
    """What became of a request that was taken in."""

    arrival: float
    place: Place
    times: list[float] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        gaps = sorted(later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False))
        return self.times[0] - self.arrival <= TTFT_SECONDS and gaps[int(0.95 * len(gaps))] <= ITL_SECONDS


@dataclass
class Run:
    served: list[Served]
    num_refused: int
    margin: float
    seconds: float

    @property
    def share_good(self) -> float:
        return sum(one.is_good for one in self.served) / len(self.served)

    @property
    def goodput(self) -> float:
        """Tokens a second of requests that met the objective."""
        return sum(len(one.times) for one in self.served if one.is_good) / self.seconds


def simulate(rate: float, seconds: float, limits: QueueLimits, num_blocks: int = 8192, seed: int = 1) -> Run:
    """Requests arrive at random, `rate` a second, with prompts and answers of many lengths."""
    rng = random.Random(seed)
    executor = SimulatedExecutor(seed)
    facts = ModelFacts(
        max_model_len=8192, vocab_size=100, hidden_size=8, num_blocks=num_blocks, block_size=16, num_bytes=0,
        device_type="cpu", is_asynchronous=False, is_chunk_invariant=True, cache_salt=b"", recommended_params={},
        memory_plan="", num_cache_bytes=0,
    )  # fmt: skip
    core = EngineCore(
        EngineConfig(max_step_ms=150), SimulatedModel(executor, facts), (), clock=lambda: executor.now
    )
    stats = core.stats
    admission = Admission(lambda: stats, limits, clock=lambda: now)
    served: dict[str, Served] = {}
    ended: list[Served] = []
    num_refused, now, arrival, number = 0, 0.0, rng.expovariate(rate), 0
    while arrival < seconds or core.has_work:
        if not core.has_work:
            executor.now = max(executor.now, arrival)
        while arrival <= executor.now and arrival < seconds:
            now, number = arrival, number + 1
            length = min(3000, 1 + int(rng.lognormvariate(5.0, 1.0)))
            num_output = min(1000, 20 + int(rng.expovariate(1 / 100)))
            arrival += rng.expovariate(rate)
            try:
                admission.check_room([length], 1)
            except ApiError:
                num_refused += 1
                continue
            name = str(number)
            served[name] = Served(now, admission.enter(length, 1))
            params = SamplingParams(max_tokens=num_output, ignore_eos=True)
            prompt = [rng.randrange(100) for _ in range(length)]
            core.add_request(Request(request_id=name, prompt_token_ids=prompt, params=params, seed=0))
        if core.has_work:
            outputs = core.step()
            now, stats = executor.now, core.stats
            for output in outputs:
                one = served[output.request_id]
                one.times += [now] * len(output.tokens)
                admission.begin(one.place)
                if output.finish_reason is not None:
                    admission.leave(one.place)
                    ended.append(served.pop(output.request_id))
    return Run(ended, num_refused, admission.margin, max(seconds, executor.now))


SLO = QueueLimits(slo_ttft_ms=1000 * TTFT_SECONDS)


def test_under_twice_the_load_those_that_are_taken_in_meet_the_objective() -> None:
    full, twice = (simulate(rate, 300, SLO) for rate in (SUSTAINABLE, 2 * SUSTAINABLE))
    assert twice.num_refused > len(twice.served) / 2
    assert twice.share_good >= 0.99
    assert twice.goodput >= 0.95 * full.goodput
