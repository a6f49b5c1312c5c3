"""Log-probabilities of prompts as an engine brings them, and as float64 has them of logits."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from engine.core.engine_core import EngineCore
from engine.core.request import Request, SampledToken
from engine.core.sampling_params import SamplingParams

NUM_TOP = 3


def scored_request(request_id: str, prompt: list[int], **params: Any) -> Request:
    """A request for the log-probabilities of a prompt, and a token after it."""
    params = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": NUM_TOP, **params}
    return Request(request_id=request_id, prompt_token_ids=prompt, params=SamplingParams(**params), seed=0)


def prompt_scores(core: EngineCore[Any], requests: list[Request]) -> dict[str, list[SampledToken]]:
    """By request, what the engine brings of the tokens of its prompt from the second on; all requests at once."""
    for request in requests:
        core.add_request(request)
    scores: dict[str, list[SampledToken]] = defaultdict(list)
    while core.has_work:
        for output in core.step():
            assert output.error is None, output.error
            if output.prompt_logprobs is not None:
                scores[output.request_id] += output.prompt_logprobs.unpack()
    return scores


def assert_scores_equal(scores: list[SampledToken], prompt: list[int], logits: torch.Tensor) -> None:
    """The scores of a prompt are those of its logits [tokens, vocabulary] within 1e-4."""
    assert [score.token_id for score in scores] == prompt[1:]
    expected = torch.log_softmax(logits.double(), dim=-1)
    for score, row in zip(scores, expected, strict=False):
        assert score.logprob is not None
        assert abs(score.logprob - row[score.token_id]) < 1e-4
        # Among numbers that differ by less than their errors any order will do.
        assert (row > score.logprob + 1e-4).sum() < score.rank <= (row > score.logprob - 1e-4).sum()
        found = torch.tensor([value for _, value in score.top_logprobs])
        assert len(found) == NUM_TOP
        torch.testing.assert_close(found.double(), row.topk(NUM_TOP).values, atol=1e-4, rtol=0)
        of_these = row[[token_id for token_id, _ in score.top_logprobs]]
        torch.testing.assert_close(found.double(), of_these, atol=1e-4, rtol=0)
