"""Outputs in a form have the bits of one rank, with shared layers and with stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.core import scheduler
from tests.helpers.forms import alone, make_core, make_requests, run, run_with_late_masks
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint


@pytest.mark.parametrize("options", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}])
def test_the_bits_of_one_rank(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    write_checkpoint(path, TINY_CONFIGS["llama"])
    expected = alone(make_core(path, quant="int8"), make_requests())
    core = make_core(path, quant="int8", **options)
    try:
        assert run(core, make_requests()) == expected
        monkeypatch.setattr(scheduler, "MASK_SECONDS", 0.0)
        monkeypatch.setattr(scheduler, "LONELY_MASK_SECONDS", 0.0)
        assert run_with_late_masks(core) == expected
    finally:
        core.close()
