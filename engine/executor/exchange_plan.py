"""What a rank exchanges with others in a step, as it is planned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from engine.config import SchedulerConfig, format_bytes
from engine.models.decoder import Decoder, DecoderLayer
from engine.models.modules import ROLES
from engine.parallel.exchanges import Exchange, counted, gathered, sent, step_bytes, summed
from engine.parallel.symmetric import MAX_BYTES


@dataclass(frozen=True, slots=True)
class ExchangePlan:
    """What a rank exchanges with others in a step.

    Attributes:
        rank: In words.
        has_run: Whether any machine has run what carries the exchanges out.
        num_seqs, num_tokens: Of the largest decode, and of the largest step with one prompt in it.
    """

    rank: str
    exchanges: tuple[Exchange, ...]
    carrier: str
    has_run: bool
    num_seqs: int
    num_tokens: int

    def __str__(self) -> str:
        def total(num_tokens: int, num_draws: int) -> str:
            parts = step_bytes(self.exchanges, num_tokens, num_draws)
            listed = ", ".join(f"{kind} {format_bytes(count)}" for kind, count in parts.items())
            return f"{format_bytes(sum(parts.values()))} ({listed})"

        unrun = "" if self.has_run else "; no machine has run this path yet"
        return "\n".join(
            [
                f"  {self.rank}, exchanges a step over {self.carrier}{unrun}; exact bytes that this rank hands over:",
                *(
                    f"    {exchange.kind:<6} {exchange.count:>4} x {exchange.row_bytes:>9} B"
                    f" a {'token' if exchange.of == 'token' else 'row that draws'}: {exchange.name}"
                    for exchange in self.exchanges
                ),
                f"    decode of {self.num_seqs}: {total(self.num_seqs, self.num_seqs)}",
                f"    prompt chunk of {self.num_tokens}: {total(self.num_tokens, 1)}",
            ]
        )


def plan_exchanges(
    model: Decoder, scheduler: SchedulerConfig, rank: int, device: torch.device, is_symmetric: bool
) -> ExchangePlan | None:
    """What a rank exchanges in a step; None if there is one rank.

    Args:
        model: The rank's share; may be on the meta device.
        rank: Among all, stage by stage.
        is_symmetric: Whether small sums of floats go through symmetric memory.
    """
    shard, pipeline = model.group.shard, model.pipeline
    if shard.size * pipeline.size == 1:
        return None
    layers = pipeline.layers(model.config.num_layers)
    stage = f", layers {layers.start} to {layers.stop - 1}" if pipeline.size > 1 else ""
    is_cpu = device.type == "cpu"
    carrier = "shared memory (gloo between machines and stages)" if is_cpu else "NCCL"
    if is_symmetric:
        carrier += f", and float sums of up to {format_bytes(MAX_BYTES)} over symmetric memory"
    return ExchangePlan(
        rank=f"rank {rank} of {shard.size * pipeline.size}{stage}",
        exchanges=tuple(counted(_exchanges(model))),
        carrier=carrier,
        has_run=is_cpu,
        num_seqs=scheduler.max_num_seqs,
        num_tokens=scheduler.max_num_batched_tokens,
    )


def _exchanges(model: Decoder) -> Iterator[Exchange]:
    config, size, itemsize = model.config, model.group.size, model.dtype.itemsize
    if size > 1:
        if model.pipeline.is_first:
            yield summed("embedding", config.hidden_size, itemsize)
        for layer in model.layers:
            assert isinstance(layer, DecoderLayer)
            for role in ROLES:
                yield from layer.linears[role.name].split.exchanges(role.block, itemsize)
        if model.pipeline.is_last:
            yield gathered("logits", config.vocab_size, size, itemsize, of="draw")
    if not model.pipeline.is_last:
        yield sent("hidden states to the next stage", config.hidden_size, itemsize)
