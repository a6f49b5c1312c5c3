"""What programs pass as prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engine.errors import RequestError
from engine.frontend.prompts import read_prompts


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("abc", ["abc"]),
        (["abc", "d"], ["abc", "d"]),
        ([1, 2], [[1, 2]]),
        ((1, 2), [[1, 2]]),
        (range(3), [[0, 1, 2]]),
        ([[1, 2], "a", (3,)], [[1, 2], "a", [3]]),
        (np.array([1, 2]), [[1, 2]]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ([np.int64(1), 2], [[1, 2]]),
        (torch.tensor([1, 2]), [[1, 2]]),
        ([torch.tensor([1, 2]), np.array([3])], [[1, 2], [3]]),
        ((text for text in "ab"), ["a", "b"]),
        ({"prompt_token_ids": [1, 2]}, [[1, 2]]),
        ({"prompt": "abc", "prompt_token_ids": [1]}, [[1]]),
        ([{"prompt": "abc"}, {"prompt_token_ids": torch.tensor([1])}], ["abc", [1]]),
        ([], []),
    ],
)
def test_forms(given: Any, expected: Any) -> None:
    found = read_prompts(given)
    assert found == expected
    assert all(type(token_id) is int for prompt in found if isinstance(prompt, list) for token_id in prompt)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "found None"),
        (b"abc", "found b'abc'"),
        ([b"abc"], "found b'abc'"),
        (5, "found 5"),
        (["a", None], "found None"),
        ([1, "a"], "found 1"),
        ([[1, "a"]], "expected token ids, found 'a'"),
        ([[1, 2.5]], "found 2.5"),
        (torch.tensor([0.5]), "found 0.5"),
        ([[True]], "found True"),
        ({"text": "abc"}, "a dictionary of ['text']"),
        ({"prompt": "abc", "multi_modal_data": 1}, "['multi_modal_data', 'prompt']"),
        ({}, "a dictionary of []"),
    ],
)
def test_others_are_refused_by_name(given: Any, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_prompts(given)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
