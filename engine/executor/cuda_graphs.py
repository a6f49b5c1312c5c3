"""CUDA graphs of the forward pass: a decode step as one launch, for a few sizes that steps are padded to."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from tqdm import tqdm

from engine.config import format_bytes

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 384, 512)


def graph_sizes(max_num_seqs: int) -> list[int]:
    """The sizes that are captured, ascending; steps of more sequences than the largest are launched one by one."""
    return sorted({*(size for size in SIZES if size < max_num_seqs), min(max_num_seqs, SIZES[-1])})


class CudaGraphs:
    """Captured forward passes by size; they share one pool of memory.

    Args:
        prepare: Puts inputs padded to a size in their place, outside the graph.
        run: The forward pass over inputs of that size, which lie at fixed addresses; returns the logits.
        max_num_seqs: Most sequences in a step.

    Attributes:
        num_bytes: Memory of the device that capturing took.
    """

    def __init__(
        self, prepare: Callable[[int], None], run: Callable[[int], torch.Tensor], max_num_seqs: int
    ) -> None:
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        free, _ = torch.cuda.mem_get_info()
        pool = torch.cuda.graph_pool_handle()
        # The largest first: the smaller ones fit into its memory.
        for size in tqdm(
            graph_sizes(max_num_seqs)[::-1], desc="Capturing CUDA graphs", unit="size", leave=False
        ):
            prepare(size)
            run(size)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits = run(size)
            self._graphs[size] = graph, logits
        self.num_bytes = free - torch.cuda.mem_get_info()[0]
        logger.info("%d CUDA graphs captured in %s", len(self._graphs), format_bytes(self.num_bytes))

    def size_for(self, num_rows: int) -> int | None:
        """The smallest captured size that holds so many rows."""
        return next((size for size in sorted(self._graphs) if size >= num_rows), None)

    def replay(self, size: int) -> torch.Tensor:
        """Runs the forward pass; logits [size, vocabulary], valid until the next replay."""
        graph, logits = self._graphs[size]
        graph.replay()
        return logits
