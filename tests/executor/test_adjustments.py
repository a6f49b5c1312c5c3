"""What changes the logits of running sequences: brought up to date from step to step as it would be made anew."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np

from engine.core.batch import Draw
from engine.core.sampling_params import SamplingParams
from engine.executor.adjustments import AdjustmentTable

VOCABULARY = 400

PARAMS = [
    SamplingParams(logit_bias={token: token / 9 - 3 for token in range(0, 60, 2)}),
    SamplingParams(repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=-0.2, logit_bias={5: 1.0}),
    SamplingParams(frequency_penalty=0.1),
    SamplingParams(repetition_penalty=0.8),
    SamplingParams(min_tokens=3, max_tokens=9, stop_token_ids=(7, 5)),
    SamplingParams(),
]


def entries(
    table: AdjustmentTable, draws: list[Draw], names: list[int]
) -> dict[tuple[int, int], tuple[float, ...]]:
    """By row and token."""
    found = table.update(draws, names)
    if found is None:
        return {}
    columns = (found.rows, found.token_ids, found.bias, found.repetition, found.subtract)
    assert found.rows.tolist() == sorted(found.rows.tolist())
    listed = [tuple(entry) for entry in zip(*(column.tolist() for column in columns), strict=True)]
    by_token = {entry[:2]: entry[2:] for entry in listed}
    assert len(by_token) == len(listed)
    return by_token


def by_definition(row: int, draw: Draw) -> dict[tuple[int, int], tuple[float, ...]]:
    params, found = draw.params, {}
    for token in range(VOCABULARY):
        bias = -np.inf if token in draw.banned_token_ids else np.float32(params.logit_bias.get(token, 0.0))
        count = draw.output_token_ids.count(token)
        is_seen = count > 0 or (token in draw.prompt_token_ids and params.repetition_penalty != 1.0)
        repetition = np.float32(params.repetition_penalty if is_seen else 1.0)
        subtract = np.float32(0.0)
        if count:
            subtract = np.float32(params.frequency_penalty) * np.float32(count) + np.float32(
                params.presence_penalty
            )
        is_named = token in params.logit_bias or token in draw.banned_token_ids
        if is_seen or is_named:
            found[row, token] = (float(bias), float(repetition), float(subtract))
    return found


def draw_of(params: SamplingParams, prompt: tuple[int, ...], output: tuple[int, ...], seed: int) -> Draw:
    banned = (2, *params.stop_token_ids) if len(output) < params.min_tokens else ()
    draw = Draw(params, seed, 0, len(prompt) + len(output), banned_token_ids=banned)
    return replace(draw, prompt_token_ids=prompt, output_token_ids=output) if params.has_penalties else draw


def test_a_table_says_what_is_defined_at_every_step() -> None:
    source, table = random.Random(1), AdjustmentTable()
    prompts = [tuple(source.choices(range(VOCABULARY), k=30)) for _ in PARAMS]
    outputs = [tuple(source.choices(range(40), k=300)) for _ in PARAMS]
    for step in range(0, 300, 7):
        # Some steps leave rows out; and a slot may get another sequence.
        chosen = [row for row in range(len(PARAMS)) if (row + step) % 5]
        which = [row if step < 150 else (row + 1) % len(PARAMS) for row in chosen]
        draws = [draw_of(PARAMS[row], prompts[row], outputs[row][:step], row) for row in which]
        expected: dict[tuple[int, int], tuple[float, ...]] = {}
        for number, draw in enumerate(draws):
            expected |= by_definition(number, draw)
        assert entries(table, draws, chosen) == expected


def test_a_sequence_that_begins_anew_is_not_taken_for_the_old_one() -> None:
    params, table = SamplingParams(frequency_penalty=1.0), AdjustmentTable()
    for output in ((1, 2, 3), (4, 5, 6), (4,), (9, 5)):
        draw = draw_of(params, (8,), output, 0)
        assert entries(table, [draw], [0]) == by_definition(0, draw)


def test_rows_without_changes_have_none() -> None:
    draws = [draw_of(SamplingParams(), (1,), (2,), 0)] * 3
    assert AdjustmentTable().update(draws, [0, 1, 2]) is None
