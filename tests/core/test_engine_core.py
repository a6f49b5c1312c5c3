"""EngineCore over a model that is none, without torch; and what it makes of a model's own sampling defaults."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from engine.core.engine_core import _default_params
from engine.errors import CheckpointError


def test_defaults_are_brought_to_the_types_of_sampling_params() -> None:
    given = {"temperature": 1, "top_k": 20.0, "top_p": None, "do_sample": True, "eos_token_id": [1, 2]}
    params = _default_params(given)
    assert params == {"temperature": 1.0, "top_k": 20}
    assert isinstance(params["top_k"], int)


@pytest.mark.parametrize("given", [{"temperature": "hot"}, {"top_p": 7.0}, {"top_k": [3]}])
def test_defaults_that_no_request_could_have_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="generation_config"):
        _default_params(given)


FAKE_MODEL = """
import sys
from dataclasses import dataclass
from engine.config import EngineConfig
from engine.core.engine_core import EngineCore
from engine.core.executor import Drawn, ModelFacts
from engine.core.request import Request, SampledToken
from engine.core.sampling_params import SamplingParams

class Counting:
    "Draws the position of each token."
    def execute(self, batch):
        return [row.start + len(row.token_ids) for row in batch.rows if row.draw is not None]

    def sample(self, logits, batch, draws):
        drawn = iter(logits)
        return Drawn([None if draw is None else SampledToken(next(drawn)) for draw in draws])

@dataclass
class FakeModel:
    facts: ModelFacts
    executor = Counting()
    fatal = ()
    num_compilations = 0
    def check(self): pass
    def close(self): pass

facts = ModelFacts(max_model_len=64, vocab_size=100, hidden_size=8, num_blocks=8, block_size=16, num_bytes=0,
                   device_type="cpu", is_asynchronous=False, is_chunk_invariant=True, cache_salt=b"",
                   recommended_params={}, memory_plan="", num_cache_bytes=0)
core = EngineCore(EngineConfig(model="none"), FakeModel(facts), ())
for name, size in (("a", 3), ("b", 40)):
    params = SamplingParams(max_tokens=4)
    core.add_request(Request(request_id=name, prompt_token_ids=[0] * size, params=params, seed=0))
tokens = {"a": [], "b": []}
while core.has_work:
    for output in core.step():
        tokens[output.request_id] += [token.token_id for token in output.tokens]
assert "torch" not in sys.modules
print(tokens)
"""


def test_the_step_loop_runs_over_any_model_and_brings_no_torch() -> None:
    result = subprocess.run([sys.executable, "-c", FAKE_MODEL], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "{'a': [3, 4, 5, 6], 'b': [40, 41, 42, 43]}"
