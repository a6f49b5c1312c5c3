"""Which requests are taken in: what waits is bounded, and whoever would wait too long is told so at once.

A prediction is made of what the engine says of itself after each step (`engine.core.stats.Load`) and of what this
server has sent it: the prompts ahead have to be computed, and a sequence needs a slot among those that run.

    seconds = max(steps · what they take without prompts + what the prompts take,
                  slots that must be left first · how often one is)

Where it was wrong lately, a margin says by how much: of a hundred requests one may wait longer than margin · seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from api.errors import ApiError, retry_later
from engine.core.stats import EngineStats

RETRY_SECONDS = 5
"""When a client may find this server started again, or another in its place."""

MOST_RETRY_SECONDS = 600

FIRST_MARGIN, LEAST_MARGIN, MOST_MARGIN = 1.5, 1.0, 4.0

MARGIN_STEP, SHARE_BEYOND = 0.1, 0.01
"""How much the margin grows where a request has waited longer; and of how many requests that may be so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """How much may wait; None: any.

    Attributes:
        max_queued_requests: Samples that wait for a slot, at most.
        max_queued_tokens: Tokens of prompts that are not computed, at most, unless they are one request's.
        slo_ttft_ms: Milliseconds in which a request must be predicted to have its first token.
        queue_timeout: Seconds after which a request ends of which nothing has been computed, or an embedding.
    """

    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    slo_ttft_ms: float | None = None
    queue_timeout: float | None = None

    @property
    def ttft(self) -> float | None:
        """`slo_ttft_ms` in seconds."""
        return None if self.slo_ttft_ms is None else self.slo_ttft_ms / 1000


@dataclass(slots=True, eq=False)
class Place:
    """A prompt that was taken in.

    Attributes:
        num_samples: Those that are not through.
        predicted: Seconds to its first token, without the margin.
        entered: When it came.
        waits: Whether nothing of it has been computed.
    """

    num_tokens: int
    num_samples: int
    predicted: float
    entered: float
    waits: bool = True
    has_begun: bool = False
    has_left: bool = False


class Admission:
    """Whether the server takes requests, besides whether its engine does.

    Args:
        stats: The engine's, as of its last step.
        clock: Seconds.

    Attributes:
        is_draining: Whether it takes no more: those that are open end, and then it does.
        margin: By what predictions are multiplied.
    """

    def __init__(
        self,
        stats: Callable[[], EngineStats],
        limits: QueueLimits | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.is_draining = False
        self.margin = FIRST_MARGIN
        self._stats, self._clock = stats, clock
        self._limits = QueueLimits() if limits is None else limits
        # Of prompts without a token: tokens, keys that these read, samples. And samples of those that have some.
        self._num_tokens, self._num_reads, self._num_queued, self._num_running = 0, 0, 0, 0

    def check(self) -> None:
        """Refuses everything while the server drains.

        Raises:
            ApiError: 503, the server is being stopped.
        """
        if self.is_draining:
            # The connection goes, too: the next request may find another server behind the same address.
            headers = {"retry-after": str(RETRY_SECONDS), "connection": "close"}
            raise ApiError(
                503, "the server is being stopped and takes no new requests", code="draining", headers=headers
            )

    def predict(self, num_tokens: int, num_samples: int = 1) -> float:
        """Seconds until a prompt of so many tokens would have its first, without the margin."""
        stats = self._stats()
        load = stats.load
        costs = load.step_costs
        share = 1.0 - stats.prefix_cache_hits / max(1, stats.prefix_cache_queries)
        ahead = share * max(0, self._num_tokens - load.num_prefilled_tokens) / load.num_engines
        own = share * num_tokens

        def seconds(tokens: float, reads: float) -> float:
            num_steps = max(tokens / load.num_step_tokens, own / load.num_prompt_step_tokens)
            return (
                math.ceil(num_steps) * load.decode_seconds + tokens * costs.prompt_token + reads * costs.read
            )

        own_reads = own * num_tokens / 2
        num_missing = self._num_running + self._num_queued + num_samples - load.num_slots
        slot = max(0, num_missing) * load.slot_seconds / load.num_slots
        reads = share * self._num_reads / load.num_engines + own_reads
        return max(seconds(ahead + own, reads), slot + seconds(own, own_reads))

    def check_room(self, lengths: Sequence[int], num_samples: int) -> None:
        """Refuses a request for which the queue has no room, or that would wait too long.

        Where nothing is open, everything is tried: only steps tell what steps cost.

        Args:
            lengths: Tokens of each prompt.
            num_samples: Of each prompt.

        Raises:
            ApiError: 429, with the time after which there may be room.
        """
        num_open = self._num_running + self._num_queued
        if not num_open:
            return
        limits, load = self._limits, self._stats().load
        num_new, num_tokens = len(lengths) * num_samples, sum(lengths)
        num_waiting, most = max(0, num_open - load.num_slots), limits.max_queued_requests
        if most is not None and num_open + num_new - load.num_slots > most:
            raise _refusal(
                f"{num_waiting} requests wait, this adds {num_new}, and --max-queued-requests is {most}",
                "queue_full",
                self.predict(1),
            )
        num_left = max(0, self._num_tokens - load.num_prefilled_tokens)
        if (
            limits.max_queued_tokens is not None
            and num_left
            and num_left + num_tokens > limits.max_queued_tokens
        ):
            raise _refusal(
                f"prompts of {num_left} tokens wait, this one has {num_tokens}, and --max-queued-tokens is "
                f"{limits.max_queued_tokens}",
                "queue_full",
                self.predict(1),
            )
        seconds = self.margin * self.predict(num_tokens, num_new)
        if limits.ttft is not None and seconds > limits.ttft:
            raise _refusal(
                f"the first token is predicted after {seconds:.1f} s, and --slo-ttft-ms is {limits.slo_ttft_ms:g}",
                "slo_ttft",
                seconds - limits.ttft,
            )

    @property
    def queue_timeout(self) -> float | None:
        """Seconds after which a request ends of which nothing has been computed; None: it waits."""
        return self._limits.queue_timeout

    def waited_too_long(self) -> ApiError:
        """The error of a request that has waited for so long."""
        return _refusal(
            f"the request has waited for {self.queue_timeout:g} s, the --queue-timeout",
            "queue_timeout",
            self.predict(1),
            status=503,
        )

    def enter(self, num_tokens: int, num_samples: int) -> Place:
        """Counts a prompt in; `leave` must follow."""
        place = Place(num_tokens, num_samples, self.predict(num_tokens, num_samples), self._clock())
        self._count_queued(place, 1)
        return place

    def begin(self, place: Place) -> None:
        """Notes that a prompt has its first token; what comes after that makes no difference."""
        if place.has_begun or place.has_left:
            return
        place.has_begun = True
        self._count_queued(place, -1)
        self._num_running += place.num_samples
        limit = self._limits.ttft
        # Who hardly waits tells nothing of those who nearly wait too long.
        if limit is not None and place.predicted > limit / 4:
            is_beyond = self._clock() - place.entered > self.margin * place.predicted
            self.margin += MARGIN_STEP * (is_beyond - SHARE_BEYOND)
            self.margin = min(max(self.margin, LEAST_MARGIN), MOST_MARGIN)

    def end_samples(self, place: Place, num_samples: int) -> None:
        """Notes that samples of a prompt that has begun are through, whose siblings may run on."""
        self._num_running -= num_samples
        place.num_samples -= num_samples

    def leave(self, place: Place) -> None:
        """Counts a prompt out that has ended; may be called twice."""
        if place.has_left:
            return
        place.has_left = True
        if place.has_begun:
            self._num_running -= place.num_samples
        else:
            self._count_queued(place, -1)

    def _count_queued(self, place: Place, sign: int) -> None:
        self._num_tokens += sign * place.num_tokens
        self._num_reads += sign * (place.num_tokens**2 // 2)
        self._num_queued += sign * place.num_samples


def _refusal(why: str, code: str, seconds: float, status: int = 429) -> ApiError:
    return retry_later(status, why, code, min(seconds, MOST_RETRY_SECONDS))
