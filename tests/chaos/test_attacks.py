"""Each attack against a real server: a stream beside it keeps its bytes, and gets tokens while the server works.

How long anything takes is for `make chaos` to say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from benchmarks.attacks import ATTACKS, Attack, ControlStream, Target, carry_out
from tests.api.conftest import API_KEY, start_server

pytestmark = pytest.mark.process

LEAST_TOKENS = 10
"""What a stream has while the server works for a second or two: on an event loop that stands still it has none."""


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlStream]:
    with start_server(tmp_path_factory.mktemp("attacked"), "--api-key", API_KEY) as running:
        running.wait_until_ready()
        yield ControlStream(Target(running.port, API_KEY))
        assert running.process.poll() is None, running.log.read_text()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name.replace(" ", "_"))
def test_a_stream_goes_on_beside_an_attack(control: ControlStream, attack: Attack) -> None:
    outcome = asyncio.run(carry_out(attack, control))
    assert outcome.problem is None
    assert set(outcome.statuses) <= attack.statuses
    if attack.is_work:
        assert outcome.num_tokens >= LEAST_TOKENS
