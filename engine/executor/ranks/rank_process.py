"""A rank's process: `python -m engine.executor.ranks.rank_process ORDERS REPORTS`, which only rank 0 starts.

It runs the same steps over its share of the model as rank 0 does, in the same order. Lives as long as its parent: the
parent holds the other end of standard input.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
import zmq

from engine import logs
from engine.cache_directory import caching_in
from engine.config import EngineConfig
from engine.core.batch import Batch
from engine.errors import EngineError
from engine.executor.ranks.agreement import Standing, digest_of
from engine.executor.ranks.launching import Link
from engine.executor.ranks.limits import BEAT_SECONDS
from engine.executor.ranks.messages import (
    Beat,
    Brought,
    Done,
    Execute,
    RankFailed,
    RankHere,
    RankReady,
    RankSays,
    RankStart,
    Sample,
    encode,
    to_rank_decoder,
)
from engine.executor.runner import ModelRunner
from engine.loading.dummy import open_model
from engine.parallel.pipeline import waiting_for_device
from engine.parallel.waiting import WaitRecord
from engine.process import follow_parent


def main(orders: str, reports: str) -> int:
    """Follows rank 0. Returns the exit status of a failure."""
    follow_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs.configure(os.environ.get("ENGINE_LOG_FORMAT"), logging.WARNING)
    follow(Link(orders), Link(reports))
    return 1


def follow(orders_link: Link, reports: Link) -> None:
    """Loads the rank's share and does what rank 0 says.

    Where it cannot, it says so and waits to be ended: those that exchange with it would fail if it went, and might be
    heard first.
    """
    with zmq.Context() as context, context.socket(zmq.PULL) as orders, context.socket(zmq.PUSH) as answers:
        orders_link.connect(orders)
        reports.connect(answers)
        start = to_rank_decoder.decode(orders.recv())
        assert isinstance(start, RankStart)
        follower, record = Follower(start.rank), WaitRecord()
        beating = (context, reports, start.rank, record, threading.get_ident())
        threading.Thread(target=_beat, args=beating, daemon=True).start()
        try:
            config = EngineConfig(**start.options)
            answers.send(encode(RankHere(start.rank)))

            def say(line: str) -> None:
                answers.send(encode(RankSays(start.rank, line)))

            checkpoint = open_model(Path(start.path), config.load_format)
            with caching_in(config.cache_dir):
                runner = ModelRunner(config, checkpoint, start.rank, start.store, say=say, record=record)
            answers.send(encode(RankReady(start.rank)))
            while True:
                with record.waiting((0,), "order"):
                    order = orders.recv()
                report = follower.follow(runner, order)
                if report is not None:
                    answers.send(encode(report))
        except Exception as error:
            # What ended an exchange is another rank's, most likely.
            if not isinstance(error, EngineError) and record.failed in (None, "device"):
                traceback.print_exc()
            kind, message = type(error).__name__, str(error)
            answers.send(encode(RankFailed(start.rank, follower.step, kind, message)))
            threading.Event().wait()


class Follower:
    """Does what rank 0 says.

    Attributes:
        step: The step that was begun last.
    """

    def __init__(self, rank: int) -> None:
        self.rank, self.step = rank, 0
        self._executed: tuple[bytes, Batch, torch.Tensor]

    def follow(self, runner: ModelRunner, order: bytes) -> Done | None:
        """Runs an order; the report on it, if it ends a step."""
        message = to_rank_decoder.decode(order)
        match message:
            case Execute(step, batch):
                self.step = step
                self._executed = order, batch, runner.execute(batch)
            case Sample(step, draws):
                executed, batch, logits = self._executed
                if not runner.place.pipeline.is_last:
                    return Done(self.rank, step, digest_of(executed, []))
                sampled = runner.sample(logits, batch, draws)
                with waiting_for_device(runner.place.group, runner.place.pipeline):
                    results = sampled.read()
                done = Done(self.rank, step, digest_of(executed, results))
                if runner.place.tells_what_was_drawn:
                    done.results = [Brought.of(result) for result in results]
                return done
        return None


def _beat(
    context: zmq.Context[zmq.Socket[bytes]], reports: Link, rank: int, record: WaitRecord, thread_id: int
) -> None:
    # At its end the process closes the context under this thread.
    with contextlib.suppress(zmq.ZMQError), context.socket(zmq.PUSH) as socket:
        reports.connect(socket)
        while True:
            socket.send(encode(Beat(rank, Standing.of(record, thread_id))))
            time.sleep(BEAT_SECONDS)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
