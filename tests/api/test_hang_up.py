"""Work for a client ends when the client hangs up, whatever else happens in the same turn of the event loop."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from api.errors import ClientDisconnected
from api.generation import in_time
from api.streaming import until_disconnect

pytestmark = pytest.mark.anyio


async def test_a_hang_up_is_seen_beside_an_output_in_time() -> None:
    gone, output = asyncio.Event(), asyncio.get_running_loop().create_future()
    service = SimpleNamespace(admission=SimpleNamespace(queue_timeout=None))

    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def work() -> None:
        place = cast(Any, SimpleNamespace(waits=False))
        await in_time(cast(Any, service), output, time.perf_counter(), 600, place)
        await asyncio.Event().wait()

    task = asyncio.create_task(until_disconnect(cast(Any, receive), work()))
    while not (output._callbacks or task.done()):
        await asyncio.sleep(0)
    output.set_result(None)
    gone.set()
    with pytest.raises(ClientDisconnected):
        await asyncio.wait_for(task, 60)


async def test_a_connection_that_cannot_be_read_is_a_hang_up() -> None:
    async def receive() -> dict[str, Any]:
        raise ConnectionError("lost")

    with pytest.raises(ClientDisconnected):
        await asyncio.wait_for(until_disconnect(cast(Any, receive), asyncio.Event().wait()), 60)
