"""What EngineCore makes of a model's own sampling defaults."""

from __future__ import annotations

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
