"""The sampler: from logits to tokens, one call a step over [rows, vocabulary], the same on every device.

`sample`, read from top to bottom, is the order of operations, and the order is that of vLLM's `Sampler.forward`. Each
operation is a kernel's, which picks its body by device. What is drawn in a row depends on that row's logits and draw
alone. Filters keep or drop equal logits together, and among equal maxima the lowest token id wins.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch

from engine.core.batch import Batch, Draw
from engine.core.executor import Drawn, Sampled
from engine.core.random import draw_key
from engine.core.request import RowFailure, RowResult, SampledToken
from engine.core.sampling_params import SAMPLING_PARAMETERS
from engine.executor.adjustments import AdjustmentTable
from engine.kernels.sample import (
    Adjustments,
    DrawParameters,
    Logprobs,
    adjust_logits,
    draw_tokens,
    logprobs_of,
    mask_logits,
    select_rows,
)

_PARAMETER_WORDS = {
    parameter.name: torch.float32 if parameter.kind is float else torch.int32
    for parameter in SAMPLING_PARAMETERS
    if parameter.name in DrawParameters.__slots__
}

DRAW_WORDS = {"key_low": torch.int32, "key_high": torch.int32, **_PARAMETER_WORDS}
"""By name, the types of `DrawParameters`: words of 32 bits."""


@dataclass(frozen=True, slots=True)
class SamplerInputs:
    """What the sampler reads beside logits and draws, on the logits' device; R rows draw.

    Attributes:
        parameters: The draws as the kernel takes them.
        slots: [R] int32, the rows' places in the running batch.
        last_tokens: [places] int32; takes each row's token (0 for none), where the next step finds it.
        changes: What changes the logits of each sequence, kept from step to step.
        sequences: For each row what `changes` knows its sequence by.
    """

    parameters: DrawParameters
    slots: torch.Tensor
    last_tokens: torch.Tensor
    changes: AdjustmentTable
    sequences: Sequence[Hashable]

    @staticmethod
    def on_cpu(batch: Batch, last_tokens: torch.Tensor, changes: AdjustmentTable) -> SamplerInputs:
        """The inputs of a batch's draws."""
        drawing = [(row.slot, row.draw) for row in batch.rows if row.draw is not None]
        return SamplerInputs(
            parameters_of([draw for _, draw in drawing]),
            torch.from_numpy(np.array([slot for slot, _ in drawing], np.int32)),
            last_tokens,
            changes,
            sequences_of(batch),
        )


def sample(logits: torch.Tensor, draws: Sequence[Draw | None], inputs: SamplerInputs) -> Sampled:
    """Launches the draws of a step.

    Args:
        logits: [rows that draw, vocabulary] float32, contiguous; changed in place.
        draws: How to draw, one a row of the batch; None where its prompt goes on.

    Returns:
        One entry a row of the batch; a row that cannot be sampled does not touch the others.
    """
    wanted = [draw for draw in draws if draw is not None]
    if not wanted:
        return Drawn([None] * len(draws))

    # The model's own logits, where log-probabilities are asked for.
    asking = [row for row, draw in enumerate(wanted) if draw.params.logprobs is not None]
    index = to_device(torch.tensor(asking, dtype=torch.int32), logits.device) if asking else None
    raw = None if index is None else select_rows(logits, index)

    # What allowed_token_ids and the form allow.
    allowed_tokens = allowed_tokens_of(wanted)
    if allowed_tokens is not None:
        mask_logits(logits, to_device(allowed_tokens, logits.device))

    # logit_bias, then penalties; and tokens that are banned: until min_tokens, or since they complete bad_words.
    adjustments = inputs.changes.update(wanted, inputs.sequences)
    if adjustments is not None:
        entries = (to_device(getattr(adjustments, name), logits.device) for name in Adjustments.__slots__)
        adjust_logits(logits, Adjustments(*entries))

    # Temperature; top_k, min_p, then top_p over what these two left; the draw. One kernel.
    tokens = draw_tokens(
        logits,
        inputs.parameters,
        filters=any(map(has_filters, wanted)),
        last_tokens=inputs.last_tokens,
        table_rows=inputs.slots,
    )

    # Log-probabilities of what was drawn.
    logprobs = None
    if raw is not None and index is not None:
        nums = [wanted[row].params.logprobs or 0 for row in asking]
        logprobs = logprobs_of(raw, tokens.index_select(0, index), nums)

    return SamplerOutput.start(draws, tokens, logprobs)


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """Tokens on their way to the host.

    Attributes:
        draws: One a row of the batch.
        tokens: [rows that draw] int32, -1 where there was nothing to draw from.
        logprobs: Of the rows that ask for them.
        arrived: Recorded after the copies; None where they are no matter of time.
    """

    draws: Sequence[Draw | None]
    tokens: torch.Tensor
    logprobs: Logprobs | None
    arrived: torch.cuda.Event | None

    @staticmethod
    def start(draws: Sequence[Draw | None], tokens: torch.Tensor, logprobs: Logprobs | None) -> SamplerOutput:
        """Starts the copies to the host."""
        if logprobs is not None:
            logprobs = Logprobs(*(to_host(getattr(logprobs, name)) for name in Logprobs.__slots__))
        tokens_on_host = to_host(tokens)
        arrived = None
        if tokens.device.type == "cuda":
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        return SamplerOutput(draws, tokens_on_host, logprobs, arrived)

    def read(self) -> list[RowResult]:
        """Waits for the tokens: the one synchronization of a step."""
        if self.arrived is not None:
            self.arrived.synchronize()
        token_ids = iter(self.tokens.tolist())
        found = () if self.logprobs is None else astuple(self.logprobs)
        logprobs = zip(*(column.tolist() for column in found), strict=True)
        return [None if draw is None else _result(draw, next(token_ids), logprobs) for draw in self.draws]


def _result(draw: Draw, token_id: int, logprobs: Iterator[tuple[Any, ...]]) -> SampledToken | RowFailure:
    """One draw's result; `logprobs` gives the next row's, if the draw asks for them."""
    num = draw.params.logprobs
    chosen, rank, ids, values = (None,) * 4 if num is None else next(logprobs)
    if token_id < 0:
        cause = "the logits are not finite (NaN or infinity)"
        if draw.allowed_tokens is not None or draw.banned_token_ids:
            cause += (
                ", or what allowed_token_ids and structured_outputs allow is all banned by bad_words and, before "
                "min_tokens, as the end or in stop_token_ids"
            )
        return RowFailure(f"no token can be drawn: {cause}")
    if num is None:
        return SampledToken(token_id)
    return SampledToken(
        token_id, logprob=chosen, rank=rank, top_logprobs=list(zip(ids[:num], values[:num], strict=True))
    )


def allowed_tokens_of(draws: Sequence[Draw]) -> torch.Tensor | None:
    """[draws, ceil(vocabulary / 32)] int32, the bitmasks of what may be drawn; None where all draws allow all."""
    masks = [draw.allowed_tokens for draw in draws]
    width = max((len(mask) for mask in masks if mask is not None), default=0)
    if width == 0:
        return None
    words = bytearray().join(b"\xff" * width if mask is None else mask for mask in masks)
    return torch.frombuffer(words, dtype=torch.int32).view(len(masks), -1)


def sequences_of(batch: Batch) -> list[Hashable]:
    """What stands for the sequence of each row that draws, as long as it runs."""
    return [(row.slot, row.admission) for row in batch.rows if row.draw is not None]


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device, for which nobody waits."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def to_host(x: torch.Tensor) -> torch.Tensor:
    """A copy in memory that the device writes to by itself."""
    if x.device.type != "cuda":
        return x
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x, non_blocking=True)


@functools.cache
def _greedy(num_rows: int) -> DrawParameters:
    """Greedy draws: nothing is random about them, and temperature 0 leaves no work to filters."""
    return DrawParameters(**{name: torch.zeros(num_rows, dtype=dtype) for name, dtype in DRAW_WORDS.items()})


def has_filters(draw: Draw) -> bool:
    """Whether top_k, top_p or min_p restrict the draw."""
    params = draw.params
    return not params.is_greedy and (params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0)


def parameters_of(draws: Sequence[Draw]) -> DrawParameters:
    """The draws as the kernel takes them, on the CPU; not to be written to."""
    if all(draw.params.is_greedy for draw in draws):
        return _greedy(len(draws))
    # Nothing is random about a greedy draw.
    keys = [
        (0, 0) if draw.params.is_greedy else draw_key(draw.seed, draw.index, draw.position) for draw in draws
    ]
    columns: dict[str, list[Any]] = {
        name: [getattr(draw.params, name) for draw in draws] for name in _PARAMETER_WORDS
    }
    columns["key_low"], columns["key_high"] = [low for low, _ in keys], [high for _, high in keys]
    columns["temperature"] = [0.0 if draw.params.is_greedy else draw.params.temperature for draw in draws]
    # More than any vocabulary is all of it.
    columns["top_k"] = [min(top_k, 2**31 - 1) for top_k in columns["top_k"]]
    # By way of numpy, which makes small arrays faster.
    arrays = {
        name: np.array(columns[name], np.float32 if dtype is torch.float32 else np.int32)
        for name, dtype in DRAW_WORDS.items()
    }
    return DrawParameters(**{name: torch.from_numpy(array) for name, array in arrays.items()})
