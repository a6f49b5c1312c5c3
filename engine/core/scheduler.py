"""Scheduler: which tokens of which sequences run in the next step.

One number rules it: each sequence's `num_computed_tokens` chases its `num_tokens`. A step has a budget of
tokens. Running sequences come first, those that decode before those that prefill; then waiting ones, unless
somebody was preempted in this step. Where blocks run out, the last in order is preempted, of those with the lowest
priority whose owner runs most: its blocks are released and it is computed again when there is room.

The next step may be planned before the tokens of the one in flight are known: planning needs their number, not
their values. A sequence whose pending token turns out to end it has then one token too many in flight, which
`update` drops. Where steps pass through several stages, as many are in flight, each with its share of the sequences;
one whose token is pending waits for it then.

A request for a vector of its prompt ends once that is computed: the vector is what its last chunk brings instead of a
token, and pending until then. A mean takes all states, and therefore finds none of its tokens in the prefix cache.

A step that others' tokens wait for is bounded by time, too: it computes as much of prompts, beside the sequences that
decode, as the prices allow that earlier steps had (`engine.core.pace`).

A sequence whose output has a form is drawn under a mask, which a thread makes (`engine.core.grammar`). Where it is
late, what the step draws of that sequence is dropped, and the sequence draws again in the next step.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Collection
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from engine.config import SchedulerConfig
from engine.core.bans import bitmask_of, completing_tokens
from engine.core.batch import PENDING, Batch, BatchRow, Draw, Pool, Scoring
from engine.core.fair_share import FairShare
from engine.core.grammar import Grammar, Grammars, Mask
from engine.core.kv_cache import KVCacheManager
from engine.core.outputs import FinishReason
from engine.core.pace import Pace
from engine.core.request import (
    EngineOutput,
    PooledState,
    PromptLogprobs,
    Request,
    RowFailure,
    RowResult,
    SampledToken,
    ScoredPrompt,
    Sequence,
    SequenceStatus,
)
from engine.core.stats import EngineStats
from engine.core.step_costs import StepSize
from engine.core.step_trace import StepTrace, WaitReason
from engine.core.waiting import WaitingQueue

WATERMARK = 0.01
"""Share of the blocks that admission leaves free, so that a newcomer is not preempted at once."""

MAX_HASHED_TOKENS = 2**14
"""Tokens of waiting prompts that one step hashes before it leaves the rest of them to the next: some milliseconds."""

MASK_SECONDS, LONELY_MASK_SECONDS = 0.005, 0.1
"""How long a step waits for the masks of its rows: where others draw, and where nobody does."""


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """One row of a step in flight: it computes `sequence`'s tokens start … end - 1.

    Attributes:
        admission: The sequence's when the row was planned.
        draw: None where nothing is drawn, or nobody takes it.
        failure: Why the sequence cannot go on, if it was found after planning.
    """

    sequence: Sequence
    start: int
    end: int
    admission: int
    draw: Draw | None
    failure: str | None = None


class Scheduler:
    """Holds every live sequence and plans steps over them.

    Args:
        eos_token_ids: Tokens that end a sequence unless it ignores them.
        cache_salt: Start of every hash chain: what a cached block depends on besides its tokens.
        enable_prefix_caching: Without it only the samples of one request share blocks.
        grammars: What keeps the forms of outputs.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv_cache: KVCacheManager,
        eos_token_ids: Collection[int],
        cache_salt: bytes,
        enable_prefix_caching: bool,
        grammars: Grammars,
    ) -> None:
        self.config = config
        self.kv_cache = kv_cache
        self.eos_token_ids = frozenset(eos_token_ids)
        self.cache_salt = cache_salt
        self.enable_prefix_caching = enable_prefix_caching
        self.grammars = grammars
        self.requests: dict[str, list[Sequence]] = {}
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_steps = 0
        self.num_scheduled_tokens = 0
        self.trace = StepTrace()
        self.pace = Pace()
        # Whether the cache had no room for another.
        self._is_full = False
        self._shares = FairShare()
        self._waiting = WaitingQueue(self._shares.served)
        self._in_flight: deque[list[PlannedRow]] = deque()
        self._late_masks: set[Future[Mask]] = set()
        self._free_slots = list(reversed(range(config.max_num_seqs)))
        self._arrivals = count()
        self._admissions = count()

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    @property
    def stats(self) -> EngineStats:
        """Counters and gauges as of now."""
        pool = self.kv_cache.pool
        return EngineStats(
            num_requests_running=len(self.running),
            num_requests_waiting=len(self._waiting),
            kv_cache_usage_perc=1.0 - pool.num_free / pool.num_blocks,
            prefix_cache_queries=self.kv_cache.num_queried_tokens,
            prefix_cache_hits=self.kv_cache.num_hit_tokens,
            num_preemptions=self.num_preemptions,
            num_steps=self.num_steps,
            num_scheduled_tokens=self.num_scheduled_tokens,
            load=self.pace.load(
                self.config,
                self.running,
                max(1, len(self.running)) if self._is_full else self.config.max_num_seqs,
            ),
        )

    def add(self, request: Request) -> None:
        """Queues the samples of a request; all but the first wait for the first one's blocks."""
        salt = self.cache_salt
        if request.cache_salt:
            salt += hashlib.blake2b(request.cache_salt.encode(), digest_size=16).digest()
        if not self.enable_prefix_caching:
            salt += f"{request.request_id}/{next(self._arrivals)}".encode()
        self._shares.enter(request.owner)
        leader = None
        ids = request.params.allowed_token_ids
        allowed = None if ids is None else bitmask_of(ids, self.grammars.vocab_size)
        sequences = []
        for index in range(request.params.n):
            if request.resumed(index) is None:
                continue
            sequence = Sequence(request, index, next(self._arrivals), salt, leader, allowed=allowed)
            leader = leader or sequence
            sequences.append(sequence)
            self.trace.begin(sequence)
            self._waiting.push(sequence)
        self.requests[request.request_id] = sequences

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one sample of it, and frees its blocks; what has just ended itself is ignored."""
        for sequence in self.requests.get(request_id, []):
            if index is None or sequence.index == index:
                self._finish(sequence)

    def reset(self) -> None:
        """Ends all requests, whatever a step amid which something failed has left of them.

        Blocks of finished chunks stay in the cache: they are registered once they are computed.
        """
        for request_id in list(self.requests):
            self.abort(request_id)
        self._in_flight.clear()
        self.trace.reset()

    def schedule(self) -> Batch:
        """Plans the next step, perhaps while one is in flight.

        With work and nothing in flight there is always something to run: the first in order fits alone.
        """
        plan: dict[Sequence, int] = {}
        budget = self.config.max_num_batched_tokens
        num_preemptions = self.num_preemptions
        max_rows = -(-(len(self.running) + len(self._waiting)) // self.config.num_stages)
        running = sorted(self.running, key=lambda s: s.order)
        budget = self._go_on(plan, [s for s in running if s.num_remaining_tokens <= 1], budget, max_rows)
        prefilling = [s for s in running if s.num_remaining_tokens > 1]
        if plan:
            size = StepSize(0, len(plan), sum(s.num_computed_tokens for s in plan))
            start = prefilling[0].num_computed_tokens if prefilling else 0
            budget = min(budget, self.pace.num_prompt_tokens(self.config, size, start))
        budget = self._go_on(plan, prefilling, budget, max_rows)
        for sequence, num_tokens in plan.items():
            self._charge(sequence, num_tokens)
        obstacle: WaitReason = "preemption"
        self._is_full = num_preemptions != self.num_preemptions
        if not self._is_full:
            obstacle = self._admit(plan, budget, max_rows)
        rows = [self._row(sequence, num_tokens) for sequence, num_tokens in plan.items()]
        if rows:
            self.trace.plan(plan, obstacle, self._waiting.first())
            self._in_flight.append(
                [
                    PlannedRow(sequence, row.start, row.start + len(row.token_ids), row.admission, row.draw)
                    for sequence, row in zip(plan, rows, strict=True)
                ]
            )
        return Batch(rows)

    def _go_on(self, plan: dict[Sequence, int], running: list[Sequence], budget: int, max_rows: int) -> int:
        """Plans the next tokens of running sequences. Returns what they leave of the budget."""
        for sequence in running:
            if sequence.status is not SequenceStatus.RUNNING or budget == 0 or self._is_through(sequence):
                continue
            if len(plan) == max_rows or (self.config.num_stages > 1 and sequence.num_pending_tokens):
                continue
            num_tokens = self._chunk(sequence.num_remaining_tokens, budget)
            budget += self._make_room(sequence, sequence.num_computed_tokens + num_tokens, plan)
            if sequence.status is SequenceStatus.RUNNING:
                plan[sequence] = num_tokens
                budget -= num_tokens
        return budget

    def requests_in_flight(self) -> list[str]:
        """Ids of the requests in the steps that are planned and not taken in."""
        return [row.sequence.request.request_id for rows in self._in_flight for row in rows]

    def num_tokens_in_flight(self) -> int:
        """How many tokens these steps compute."""
        return sum(row.end - row.start for rows in self._in_flight for row in rows)

    def draws(self) -> list[Draw | None]:
        """The draws of the step planned last, one a row, now that all tokens before them are known.

        Waits for masks, but not for long: a row without one is drawn too, and what it draws is dropped.
        """
        rows = self._in_flight[-1]
        self._wait_for_masks(rows)
        draws: list[Draw | None] = []
        for number, row in enumerate(rows):
            grammar = row.sequence.grammar
            if row.draw is None or grammar is None or grammar.has_mask:
                draws.append(None if row.draw is None else self._complete(row))
            else:
                draws.append(row.draw)
                rows[number] = self._without_draw(row, grammar)
        return draws

    def resolve(self, batch: Batch) -> Batch:
        """The step planned last, `batch`, with the tokens that were pending then."""
        rows = []
        for row, planned in zip(batch.rows, self._in_flight[-1], strict=True):
            known = planned.sequence.token_ids[planned.start : planned.end]
            # A sequence that failed meanwhile has no token there, and what is computed of it is dropped.
            rows.append(replace(row, token_ids=known) if len(known) == len(row.token_ids) else row)
        return Batch(rows)

    def update(self, results: list[RowResult], seconds: float | None = None) -> list[EngineOutput]:
        """Takes in what the oldest step in flight computed, one entry a row.

        Args:
            seconds: What it took, if that was measured.
        """
        outputs: list[EngineOutput] = []
        advanced: list[Grammar] = []
        self.trace.done()
        rows = self._in_flight.popleft()
        if seconds is not None:
            size = StepSize.of((row.start, row.end) for row in rows)
            self.pace.observe(size, seconds, len(self.running))
        for row, result in zip(rows, results, strict=True):
            sequence = row.sequence
            if sequence.status is SequenceStatus.FINISHED:
                continue  # it ended while this step was in flight
            if row.failure is not None or isinstance(result, RowFailure):
                message = result.message if isinstance(result, RowFailure) else row.failure
                outputs.append(self._fail(sequence, str(message)))
                continue
            if sequence.status is SequenceStatus.RUNNING and sequence.admission == row.admission:
                self.kv_cache.register(sequence, row.start, row.end)
            self.num_scheduled_tokens += row.end - row.start
            begins, sequence.is_announced = not sequence.is_announced, True
            scores = None
            if isinstance(result, ScoredPrompt):
                scores, result = result.logprobs, result.token
            if isinstance(result, PooledState):
                self._finish(sequence)
                outputs.append(self._output(sequence, finish_reason="stop", state=result.values))
            elif row.draw is not None and result is not None:
                self._end_draw(sequence)
                outputs.append(self._append(sequence, result, scores))
                if sequence.grammar is not None and outputs[-1].finish_reason is None:
                    advanced.append(sequence.grammar)
            elif self._max_output_tokens(sequence) == 0 and row.end == sequence.num_prompt_tokens:
                self._finish(sequence)
                outputs.append(self._output(sequence, finish_reason="length", prompt_logprobs=scores))
            elif scores is not None or begins:
                # Who asked for it learns that it waits no longer.
                outputs.append(self._output(sequence, prompt_logprobs=scores))
        self.grammars.start_masks(advanced)
        self.num_steps += 1
        return outputs

    def _chunk(self, num_remaining: int, budget: int) -> int:
        """Tokens of one sequence that fit: a long prompt takes a bounded share of a step that others want too."""
        if num_remaining > 1 and len(self.running) + len(self._waiting) > 1:
            budget = min(budget, self.config.long_prefill_token_threshold)
        return min(num_remaining, budget)

    def _make_room(self, sequence: Sequence, num_tokens: int, plan: dict[Sequence, int]) -> int:
        """Extends the sequence's block table, preempting from the end of the order until that succeeds.

        A sequence that is itself the last is preempted like any other. Returns the tokens that preempted
        sequences had in the plan.
        """
        num_returned = 0
        while not self.kv_cache.extend(sequence, num_tokens):
            victim = self._last_running()
            self._preempt(victim)
            num_returned += plan.pop(victim, 0)
            if victim is sequence:
                break
        return num_returned

    def _last_running(self) -> Sequence:
        """Who gives way first. Of one owner's sequences and of two owners' only ones that is who came later, so that
        who came first of all goes on to its end.
        """
        num_running = Counter(sequence.owner for sequence in self.running)
        return max(self.running, key=lambda s: (s.priority, num_running[s.owner], s.arrival))

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        sequence.status = SequenceStatus.WAITING
        self._waiting.push(sequence)
        self.trace.note(sequence, "preempted")
        self.num_preemptions += 1

    def _admit(self, plan: dict[Sequence, int], budget: int, max_rows: int) -> WaitReason:
        """Starts waiting sequences in order, as long as the budget lasts and their whole prompts have room. Returns
        what keeps the next one.

        Those that wait for something else are left out until it is there or lost, and cost nothing meanwhile.
        """
        for block_hash in self.kv_cache.take_settled():
            self._waiting.release(block_hash)
        num_hashed = 0
        while budget > 0 and len(plan) < max_rows and len(self.running) < self.config.max_num_seqs:
            sequence = self._waiting.first()
            if sequence is None or num_hashed > MAX_HASHED_TOKENS:
                return "" if sequence is None else "hashing"
            if sequence.num_pending_tokens:
                self._waiting.park(sequence)
                self.trace.note(sequence, "pending")
                continue
            if sequence.leader and self._is_prefilling(sequence.leader):
                self._waiting.park(sequence.leader)
                self.trace.note(sequence, "leader")
                continue
            num_hashed -= len(sequence.block_hashes) * self.kv_cache.block_size
            reads_cache = sequence.request.pooling != "mean"
            prefix = self.kv_cache.find_prefix(sequence) if reads_cache else []
            num_hashed += len(sequence.block_hashes) * self.kv_cache.block_size
            is_scoring = sequence.num_scored_tokens < sequence.num_prompt_tokens
            if is_scoring:
                # Log-probabilities need the logits before each token, and no cache has those.
                prefix = prefix[: (sequence.num_scored_tokens - 1) // self.kv_cache.block_size]
            may_wait = reads_cache and not is_scoring
            coming = self.kv_cache.last_coming(sequence, len(prefix)) if may_wait else None
            if coming is not None:
                self._waiting.park(coming)
                self.trace.note(sequence, "prefix")
                continue
            if not self._has_room(sequence, prefix):
                self._is_full = True
                return "blocks"
            self._waiting.pop()
            if reads_cache:
                self.kv_cache.adopt_prefix(sequence, prefix)
            if sequence.num_cached_tokens is None:
                sequence.num_cached_tokens = sequence.num_computed_tokens
            sequence.status = SequenceStatus.RUNNING
            sequence.slot, sequence.admission = self._free_slots.pop(), next(self._admissions)
            structured = sequence.request.params.structured_outputs
            if structured is not None and sequence.grammar is None:
                sequence.grammar = self.grammars.start(structured, sequence.output_token_ids)
            self.running.append(sequence)
            num_tokens = self._chunk(sequence.num_remaining_tokens, budget)
            self.kv_cache.extend(sequence, sequence.num_computed_tokens + num_tokens)
            plan[sequence] = num_tokens
            budget -= num_tokens
            self._charge(sequence, num_tokens)
        return "budget" if budget == 0 else "places"

    def _charge(self, sequence: Sequence, num_tokens: int) -> None:
        """Counts what is computed of a sequence for the first time as served to its owner."""
        start = max(sequence.num_computed_tokens, sequence.num_served_tokens)
        sequence.num_served_tokens = max(start, sequence.num_computed_tokens + num_tokens)
        self._shares.charge(sequence.owner, sequence.num_served_tokens - start)

    def _is_prefilling(self, sequence: Sequence) -> bool:
        """Whether its first token is still to come; until then its prompt's blocks cannot be found."""
        return sequence.status is not SequenceStatus.FINISHED and sequence.num_output_tokens == 0

    def _has_room(self, sequence: Sequence, prefix: list[int]) -> bool:
        pool = self.kv_cache.pool
        num_needed = self.kv_cache.num_missing_blocks(sequence, sequence.num_tokens) - len(prefix)
        num_needed += sum(pool.is_free(block_id) for block_id in prefix)
        watermark = int(WATERMARK * pool.num_blocks) if self.running else 0
        return num_needed + watermark <= pool.num_free

    def _row(self, sequence: Sequence, num_tokens: int) -> BatchRow:
        start, end = sequence.num_computed_tokens, sequence.num_computed_tokens + num_tokens
        is_last = num_tokens == sequence.num_remaining_tokens
        pooling = sequence.request.pooling
        token_ids = sequence.token_ids[start:end]
        token_ids += [PENDING] * (num_tokens - len(token_ids))
        sequence.num_computed_tokens = end
        draw, pool = None, None
        if pooling is not None and (is_last or pooling == "mean"):
            pool = Pool(pooling, is_last)
        elif pooling is None and is_last and self._max_output_tokens(sequence) > 0:
            draw = Draw(sequence.draw_params, sequence.request.seed, sequence.index, position=end)
        sequence.num_pending_tokens += draw is not None or (pool is not None and pool.is_complete)
        return BatchRow(
            token_ids=token_ids,
            start=start,
            num_stored_tokens=sequence.num_stored_tokens,
            block_table=sequence.block_ids,
            draw=draw,
            slot=sequence.slot,
            admission=sequence.admission,
            pool=pool,
            scoring=self._scoring(sequence, start, end),
        )

    def _scoring(self, sequence: Sequence, start: int, end: int) -> Scoring | None:
        """What a chunk brings of its prompt's log-probabilities that no chunk has brought yet."""
        first, last = sequence.num_scored_tokens, min(end + 1, sequence.num_prompt_tokens)
        num_top = sequence.draw_params.prompt_logprobs
        if first >= last or num_top is None:
            return None
        sequence.num_scored_tokens = last
        return Scoring(first, first - 1 - start, sequence.token_ids[first:last], num_top)

    def _complete(self, row: PlannedRow) -> Draw:
        """The row's draw with what depends on the tokens before it."""
        assert row.draw is not None
        sequence, params = row.sequence, row.draw.params
        allowed = None if sequence.allowed is None else sequence.allowed.tobytes()
        banned: tuple[int, ...] = ()
        is_short = sequence.num_output_tokens < params.min_tokens
        if sequence.grammar is not None:
            # A form in whose place nothing else can be ends before min_tokens, and under ignore_eos.
            allowed = sequence.grammar.allowed_tokens(
                may_end=not (is_short or params.ignore_eos), among=sequence.allowed
            )
            banned = params.stop_token_ids if is_short else ()
        elif is_short:
            banned = (*self.eos_token_ids, *params.stop_token_ids)
        if sequence.request.bad_words:
            words = sequence.request.bad_words
            banned += completing_tokens(words, sequence.token_ids, sequence.num_output_tokens)
        if not banned and allowed is None and not params.has_penalties:
            return row.draw
        history = sequence.token_ids if params.has_penalties else []
        return replace(
            row.draw,
            banned_token_ids=banned,
            prompt_token_ids=tuple(history[: sequence.num_prompt_tokens]),
            output_token_ids=tuple(history[sequence.num_prompt_tokens :]),
            allowed_tokens=allowed,
        )

    def _wait_for_masks(self, rows: list[PlannedRow]) -> None:
        masks = [row.sequence.grammar.mask for row in rows if row.draw and row.sequence.grammar]
        late = {mask for mask in masks if not mask.done()}
        if len(late) == len(rows):
            wait(late, LONELY_MASK_SECONDS)
        elif late:
            # One that was late before may take long: a form is being compiled.
            wait(late - self._late_masks, MASK_SECONDS)
        self._late_masks = late

    def _without_draw(self, row: PlannedRow, grammar: Grammar) -> PlannedRow:
        """A row whose mask is late, or cannot be: its last token is computed again, or the sequence fails."""
        if grammar.error is not None:
            return replace(row, draw=None, failure=f"structured_outputs: {grammar.error}")
        if row.sequence.status is not SequenceStatus.FINISHED:
            self._end_draw(row.sequence)
            row.sequence.num_computed_tokens -= 1
        return replace(row, draw=None)

    def _end_draw(self, sequence: Sequence) -> None:
        """One of the sequence's tokens is no longer pending: preempted, it may take its turn when none is."""
        sequence.num_pending_tokens -= 1
        if not sequence.num_pending_tokens:
            self._waiting.release(sequence)

    def _is_through(self, sequence: Sequence) -> bool:
        """Whether what is pending is the last that the sequence may have, or its prompt all that is wanted."""
        if sequence.request.pooling is not None:
            return sequence.num_pending_tokens > 0
        is_prompt_through = sequence.num_computed_tokens >= sequence.num_prompt_tokens
        num_tokens = sequence.num_output_tokens + sequence.num_pending_tokens
        return is_prompt_through and num_tokens >= self._max_output_tokens(sequence)

    def _max_output_tokens(self, sequence: Sequence) -> int:
        limit = self.config.max_model_len - sequence.num_prompt_tokens
        max_tokens = sequence.request.params.max_tokens
        return limit if max_tokens is None else min(limit, max_tokens)

    def _append(
        self, sequence: Sequence, sample: SampledToken, scores: PromptLogprobs | None
    ) -> EngineOutput:
        sequence.token_ids.append(sample.token_id)
        # Its prompt's blocks can be found now.
        self._waiting.release(sequence)
        finish_reason, stop_token_id = self._finish_reason(sequence, sample.token_id)
        is_form_complete = False
        if sequence.grammar is not None and finish_reason != "stop":
            try:
                is_through = sequence.grammar.advance(sample.token_id)
            except ValueError as error:
                return self._fail(sequence, f"structured_outputs: {error}")
            if is_through:
                finish_reason, is_form_complete = "stop", sample.token_id not in self.eos_token_ids
        if finish_reason is not None:
            self._finish(sequence)
        return self._output(
            sequence,
            prompt_logprobs=scores,
            tokens=[sample],
            finish_reason=finish_reason,
            stop_token_id=stop_token_id,
            is_form_complete=is_form_complete,
        )

    def _output(self, sequence: Sequence, **brought: Any) -> EngineOutput:
        return EngineOutput(
            request_id=sequence.request.request_id,
            index=sequence.index,
            num_cached_tokens=sequence.num_cached_tokens or 0,
            **brought,
        )

    def _finish_reason(self, sequence: Sequence, token_id: int) -> tuple[FinishReason | None, int | None]:
        params = sequence.request.params
        if sequence.num_output_tokens >= params.min_tokens:
            if token_id in self.eos_token_ids and not params.ignore_eos:
                return "stop", None
            if token_id in params.stop_token_ids:
                return "stop", token_id
        is_through = sequence.num_output_tokens >= self._max_output_tokens(sequence)
        return ("length", None) if is_through else (None, None)

    def _fail(self, sequence: Sequence, message: str) -> EngineOutput:
        self.abort(sequence.request.request_id)
        return EngineOutput(
            request_id=sequence.request.request_id,
            index=sequence.index,
            finish_reason="error",
            error=message,
        )

    def _finish(self, sequence: Sequence) -> None:
        if sequence.status is SequenceStatus.RUNNING:
            self._stop(sequence)
            self.pace.count_end()
        if sequence.status is not SequenceStatus.FINISHED:
            self.trace.note(sequence, "ended")
        was_waiting = sequence.status is SequenceStatus.WAITING
        sequence.status = SequenceStatus.FINISHED
        if was_waiting:
            self._waiting.end(sequence)
        # Others need its prompt's blocks no longer.
        self._waiting.release(sequence)
        request_id = sequence.request.request_id
        siblings = self.requests.get(request_id, [])
        if siblings and all(sibling.status is SequenceStatus.FINISHED for sibling in siblings):
            del self.requests[request_id]
            self._shares.leave(sequence.owner)

    def _stop(self, sequence: Sequence) -> None:
        """Takes back what a running sequence holds. A step in flight may still write to its blocks: whoever gets
        them next runs after that step.
        """
        self.kv_cache.free(sequence)
        self.running.remove(sequence)
        self._free_slots.append(sequence.slot)
