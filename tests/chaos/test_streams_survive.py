"""Engines and ranks are killed under clients of all manners: they are told what they would have been told.

The long form, with what is printed and not asserted, is `make chaos`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.load import plan_requests
from tests.chaos.run import run
from tests.chaos.server import running_server, small_options

pytestmark = pytest.mark.process

NUM_KILLS = 2


def test_nothing_is_lost_doubled_or_changed(small_model: Path) -> None:
    requests = plan_requests(32, requests_per_second=20.0, seed=1, max_tokens=300)
    options = [*small_options(small_model, 3), "--tensor-parallel-size", "3"]
    options += ["--max-restarts", str(NUM_KILLS + 1)]
    with running_server(options) as server:
        outcome = run(server, requests, NUM_KILLS)
        print(outcome)
        assert outcome.faults == [], server.last_words()
        assert len(outcome.deaths) == NUM_KILLS
        assert {death.part for death in outcome.deaths} == {"engine", "rank"}
        assert all(death.open_names for death in outcome.deaths)
        assert outcome.after.num_processes == outcome.before.num_processes
        assert outcome.after.num_descriptors == outcome.before.num_descriptors
        assert outcome.after.private_bytes < outcome.before.private_bytes + 64 * 2**20
        assert len(outcome.after.shared_files) == len(outcome.before.shared_files)
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert server.metric(f"engine_{name}") == 0
