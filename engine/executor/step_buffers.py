"""StepBuffers: a step's inputs as one array of 32-bit words, which one copy takes to the device.

    token ids │ positions │ slots │ query starts │ … │ draws │ additions to block tables │ attention's work lists

A CUDA graph reads fixed addresses, so steps padded to the same size have the same layout. Two host arrays take
turns, since the copy of one step may still wait in the stream while the next step is written.

Block tables stay on the device, a row for each place in the running batch; a step brings what was added to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from engine.config import SchedulerConfig
from engine.core.batch import Batch, BatchRow, Draw
from engine.executor.flat_batch import BlockTables, FlatTokens, Int32Array, flatten
from engine.executor.sampler import DRAW_WORDS, parameters_of
from engine.kernels.attention.in_triton import (
    ITEM_WORDS,
    AttentionForm,
    Scratch,
    TritonPlan,
    WorkList,
    plan_items,
)
from engine.kernels.sample import DrawParameters

Table = np.ndarray[tuple[int, int], np.dtype[np.int32]]

ALIGNMENT = 4
"""Words: every part starts on 16 bytes, as the kernels were compiled for."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step's inputs on the device, T tokens and R rows, padding included; int32 where not said otherwise.

    Attributes:
        token_ids: [T]; -1 - slot stands for the token that was drawn last in that place of the batch.
        positions, slots: [T]; each token's position, and where its key and value go. Padding goes to block 0.
        last_rows: [R], the rows of the flat batch that draw; as many as there are draws count.
        draw_slots: [R], their places in the running batch.
        draws: How they draw, [R] each.
        padded_size: T and R, if the inputs lie where a CUDA graph of that size reads them.
        update_indices, update_blocks: [U], additions to the block tables: an index into the flattened tables
            and a block id.
        plans: By window, what attention reads.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    last_rows: torch.Tensor
    draw_slots: torch.Tensor
    draws: DrawParameters
    update_indices: torch.Tensor
    update_blocks: torch.Tensor
    plans: dict[int | None, TritonPlan]
    padded_size: int | None = None


@dataclass(frozen=True, slots=True)
class AttentionForms:
    """How attention's work is cut.

    Attributes:
        decode, prefill: The forms for sequences with few and with many queries; the same one if batch invariant.
        group: Query heads that share a key head.
        capacity: Rows of the scratch.
    """

    decode: AttentionForm
    prefill: AttentionForm
    group: int
    capacity: int
    scratch: Scratch

    @property
    def batch_invariant(self) -> bool:
        return self.decode is self.prefill

    def max_items(self, num_tokens: int, num_rows: int) -> int:
        """Most items that a list of attention's work can have in a step of so many tokens and rows."""
        smallest = min(self.decode.block_q, self.prefill.block_q)
        return num_tokens // smallest + num_rows + self.capacity // self.group


@dataclass(slots=True)
class Layout:
    """Names the parts of an array of words, each on a multiple of ALIGNMENT."""

    parts: dict[str, slice] = field(default_factory=dict)
    end: int = 0

    def add(self, name: str, size: int) -> None:
        self.parts[name] = slice(self.end, self.end + size)
        self.end += size + -size % ALIGNMENT


class StepBuffers:
    """The arrays, and the block tables that steps keep up to date.

    Args:
        windows: The model's sliding windows, None for attention to everything.
        waiting: A context for what waits until the device has caught up.

    Attributes:
        tables: [max_num_seqs + 1, width] int32 on the device; the last row is padding's, all null blocks.
    """

    def __init__(
        self,
        limits: SchedulerConfig,
        block_size: int,
        windows: Sequence[int | None],
        attention: AttentionForms,
        device: torch.device,
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.block_size, self.windows, self.attention = block_size, list(windows), attention
        self._waiting = waiting
        width = -(-limits.max_model_len // block_size)
        self.tables = torch.zeros(limits.max_num_seqs + 1, width, dtype=torch.int32, device=device)
        self._host_tables = BlockTables(limits.max_num_seqs, width)
        self._padding_slot = limits.max_num_seqs
        num_tokens, num_rows = limits.max_num_batched_tokens, limits.max_num_seqs
        max_items = attention.max_items(num_tokens, num_rows)
        lists = dict.fromkeys(self._list_names(("decode", "prefill")), max_items)
        size = self._layout(num_tokens, num_rows, self.tables.numel(), lists).end
        is_pinned = device.type == "cuda"
        self._host = [torch.empty(size, dtype=torch.int32, pin_memory=is_pinned) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)] if is_pinned else None  # type: ignore[no-untyped-call]
        self._device = torch.empty(size, dtype=torch.int32, device=device)
        self._padded: dict[int, tuple[Layout, StepInputs]] = {}

    def padded(self, size: int) -> StepInputs:
        """The inputs of a step of decodes that is padded to `size` rows: always at the same addresses."""
        return self._padded_layout(size)[1]

    def write(self, batch: Batch, padded_size: int | None) -> StepInputs:
        """Writes a step and starts its copy to the device.

        Args:
            padded_size: Rows of a step of decodes that a CUDA graph runs; None for the batch's own size.
        """
        rows = batch.rows
        indices, blocks = self._host_tables.update(rows)
        tokens = flatten(rows, self._host_tables.values, self.block_size)
        lengths = np.diff(tokens.ends, prepend=0)
        lists = self._work_lists(lengths, tokens.starts)
        # A sequence of decodes gets a block now and then; many new ones at a time have no room in the padded form.
        if padded_size is None or len(blocks) > padded_size:
            sizes = {name: len(items) for name, items in lists.items()}
            layout = self._layout(len(tokens.token_ids), len(rows), len(blocks), sizes)
            inputs = self._inputs(layout)
        else:
            layout, inputs = self._padded_layout(padded_size)
        host = self._host[0]
        self._host.reverse()
        if self._copied is not None:
            # Done long ago, unless steps without a draw, which nobody waits for, have run ahead.
            self._copied.reverse()
            with self._waiting():
                self._copied[-1].synchronize()
        words: Int32Array = host.numpy()
        self._write_tokens(words, layout, tokens)
        self._write_draws(words, layout, rows, tokens.ends)
        words[layout.parts["update_indices"]][: len(blocks)] = indices
        words[layout.parts["update_blocks"]][: len(blocks)] = blocks
        end = layout.end
        for name, items in lists.items():
            words[layout.parts[f"num_items.{name}"]] = len(items)
            words[layout.parts[f"items.{name}"]][: items.size] = items.ravel()
            # The last list ends the copy: padded ones are much longer than what is used of them.
            end = layout.parts[f"items.{name}"].start + items.size
        self._device[:end].copy_(host[:end], non_blocking=True)
        if self._copied is not None:
            self._copied[-1].record()
        return replace(
            inputs,
            update_indices=inputs.update_indices[: len(blocks)],
            update_blocks=inputs.update_blocks[: len(blocks)],
        )

    def forget(self, rows: Sequence[BatchRow]) -> None:
        """Lets the rows' block tables be sent again: a step failed, and what it brought may not have arrived."""
        self._host_tables.forget(rows)

    def _work_lists(self, lengths: Int32Array, starts: Int32Array) -> dict[str, Table]:
        """Attention's items by kind and window; a kind without any is left out."""
        forms = self.attention
        is_decode = lengths <= forms.decode.block_q
        kinds = {"decode": np.where(is_decode, lengths, 0), "prefill": np.where(is_decode, 0, lengths)}
        if forms.batch_invariant:
            kinds = {"decode": lengths}
        return {
            self._list_name(kind, index): plan_items(
                kept, starts, window, forms.group, form.block_q, form.num_programs, forms.capacity
            )
            for index, window in enumerate(self.windows)
            for kind, form in (("decode", forms.decode), ("prefill", forms.prefill))
            if (kept := kinds.get(kind)) is not None and kept.any()
        }

    def _write_tokens(self, words: Int32Array, layout: Layout, tokens: FlatTokens) -> None:
        count, num_tokens = len(tokens.starts), len(tokens.token_ids)
        for name in ("token_ids", "positions", "slots"):
            part = words[layout.parts[name]]
            part[:num_tokens], part[num_tokens:] = getattr(tokens, name), 0
        query_starts = words[layout.parts["query_starts"]]
        query_starts[0] = 0
        query_starts[1 : count + 1] = tokens.ends
        query_starts[count + 1 :] = np.arange(num_tokens + 1, num_tokens + len(query_starts) - count)
        parts = (("starts", tokens.starts, 0), ("table_rows", tokens.row_slots, self._padding_slot))
        for name, values, padding in parts:
            words[layout.parts[name]][:count] = values
            words[layout.parts[name]][count:] = padding

    def _write_draws(
        self, words: Int32Array, layout: Layout, rows: Sequence[BatchRow], ends: Int32Array
    ) -> None:
        drawing = [index for index, row in enumerate(rows) if row.draw is not None]
        count = len(drawing)
        words[layout.parts["last_rows"]][:count] = ends[drawing] - 1
        words[layout.parts["draw_slots"]][:count] = [rows[index].slot for index in drawing]
        draws: list[Draw] = [row.draw for row in rows if row.draw is not None]
        parameters = parameters_of(draws)
        for name in DRAW_WORDS:
            words[layout.parts[name]][:count] = getattr(parameters, name).numpy().view(np.int32)

    def _list_name(self, kind: str, window_index: int) -> str:
        return f"{kind}.{window_index}"

    def _list_names(self, kinds: Sequence[str]) -> list[str]:
        return [self._list_name(kind, index) for kind in kinds for index in range(len(self.windows))]

    def _padded_layout(self, size: int) -> tuple[Layout, StepInputs]:
        if size not in self._padded:
            lists = {name: self.attention.max_items(size, size) for name in self._list_names(["decode"])}
            layout = self._layout(size, size, size, lists)
            self._padded[size] = layout, replace(self._inputs(layout), padded_size=size)
        return self._padded[size]

    def _layout(self, num_tokens: int, num_rows: int, num_updates: int, lists: dict[str, int]) -> Layout:
        """The parts of a step; `lists` says how long each work list may be."""
        layout = Layout()
        for name in ("token_ids", "positions", "slots"):
            layout.add(name, num_tokens)
        layout.add("query_starts", num_rows + 1)
        for name in ("starts", "table_rows", "last_rows", "draw_slots", *DRAW_WORDS):
            layout.add(name, num_rows)
        layout.add("update_indices", num_updates)
        layout.add("update_blocks", num_updates)
        for name, length in lists.items():
            layout.add(f"num_items.{name}", 1)
            layout.add(f"items.{name}", length * ITEM_WORDS)
        return layout

    def _inputs(self, layout: Layout) -> StepInputs:
        words = {name: self._device[part] for name, part in layout.parts.items()}

        def work_list(kind: str, index: int) -> WorkList | None:
            name = self._list_name(kind, index)
            if f"items.{name}" not in words:
                return None
            return WorkList(words[f"items.{name}"].view(-1, ITEM_WORDS), words[f"num_items.{name}"])

        return StepInputs(
            token_ids=words["token_ids"],
            positions=words["positions"],
            slots=words["slots"],
            last_rows=words["last_rows"],
            draw_slots=words["draw_slots"],
            update_indices=words["update_indices"],
            update_blocks=words["update_blocks"],
            draws=DrawParameters(**{name: words[name].view(dtype) for name, dtype in DRAW_WORDS.items()}),
            plans={
                window: TritonPlan(
                    query_starts=words["query_starts"],
                    starts=words["starts"],
                    table_rows=words["table_rows"],
                    block_tables=self.tables,
                    decode=work_list("decode", index),
                    prefill=work_list("prefill", index),
                    scratch=self.attention.scratch,
                )
                for index, window in enumerate(self.windows)
            },
        )
