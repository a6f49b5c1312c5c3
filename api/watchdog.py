"""Watches the event loop that all requests share: how late it is, and what it was at where it hangs."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.5
STANDARD_ERROR = 2
HANG_SECONDS = 5.0
"""So late, the loop is held to hang: the stacks of all threads go to the log, once a hang."""


async def watch_loop(
    observe: Callable[[float], None], tick: float = TICK_SECONDS, hang: float = HANG_SECONDS
) -> None:
    """Measures how late the loop is, tick by tick, until it is cancelled.

    The stacks are written by a thread in C, which needs no lock of the interpreter: an extension may hold that.

    Args:
        observe: Takes the lateness in seconds.
    """
    try:
        while True:
            faulthandler.dump_traceback_later(tick + hang, file=STANDARD_ERROR)
            began = time.perf_counter()
            await asyncio.sleep(tick)
            late = time.perf_counter() - began - tick
            observe(max(0.0, late))
            if late > hang:
                logger.error("the event loop was held up for %.1f s; what it was at stands above", late)
    finally:
        faulthandler.cancel_dump_traceback_later()
