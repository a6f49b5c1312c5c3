"""The engine process of `tests.agents.scripted_engine`: all of it is real but for what a draw brings.

    python -m tests.agents.scripted_process DIRECTORY ADDRESS BEATS

The seed of a request is the name of a file in DIRECTORY with the token ids of its answer.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import engine.executor.start
from engine.config import EngineConfig
from engine.core.batch import Batch, Draw
from engine.core.executor import Drawn, Executor, Logits, Sampled
from engine.core.request import RowFailure, SampledToken
from engine.executor.start import StartedModel
from engine.frontend.engine_process import main


class ScriptedExecutor:
    """Runs every step, and then says what the script says; refuses to say what the form of the answer forbids."""

    def __init__(self, executor: Executor, directory: Path) -> None:
        self._executor, self._directory = executor, directory
        self._answers: dict[int, list[int]] = {}
        self._starts: dict[int, int] = {}

    def execute(self, batch: Batch) -> Logits:
        return self._executor.execute(batch)

    def sample(self, logits: Logits, batch: Batch, draws: list[Draw | None]) -> Sampled:
        drawn = self._executor.sample(logits, batch, draws).read()
        return Drawn([self._said(*pair) for pair in zip(drawn, draws, strict=True)])

    def _said(
        self, drawn: SampledToken | RowFailure | None, draw: Draw | None
    ) -> SampledToken | RowFailure | None:
        if draw is None or not isinstance(drawn, SampledToken):
            return drawn
        if draw.seed not in self._answers:
            self._answers[draw.seed] = json.loads((self._directory / str(draw.seed)).read_text())
            self._starts[draw.seed] = draw.position
        token_id = self._answers[draw.seed][draw.position - self._starts[draw.seed]]
        allowed = draw.allowed_tokens
        if allowed is not None and not allowed[token_id // 8] >> token_id % 8 & 1:
            return RowFailure(f"the script's token {token_id} is not allowed by the form of the answer")
        return replace(drawn, token_id=token_id)


def start_scripted(directory: Path) -> None:
    """Has engines of this process say what the files in the directory say."""
    start_model = engine.executor.start.start_model

    def start(config: EngineConfig, path: Path) -> StartedModel:
        model = start_model(config, path)
        model.executor = ScriptedExecutor(model.executor, directory)
        return model

    engine.executor.start.start_model = start


if __name__ == "__main__":
    start_scripted(Path(sys.argv[1]))
    status = main(sys.argv[2], sys.argv[3])
    sys.stderr.flush()
    os._exit(status)
