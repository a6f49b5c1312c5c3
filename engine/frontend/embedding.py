"""Embeddings: requests for the vector of a prompt, and what the engine brings of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.core.outputs import EmbeddingOutput, EmbeddingRequestOutput
from engine.core.pooling_params import PoolingParams
from engine.core.request import EngineOutput, Request
from engine.core.sampling_params import SamplingParams


def embedding_request(
    request_id: str, prompt_token_ids: list[int], params: PoolingParams, priority: int = 0, owner: str = ""
) -> Request:
    """A request for a prompt's vector, of which nothing is drawn."""
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt_token_ids,
        params=SamplingParams(),
        seed=0,
        priority=priority,
        owner=owner,
        pooling=params.pooling,
    )


@dataclass(slots=True)
class EmbeddingProcessor:
    """Makes the embedding of what the engine brings of one request; see `OutputProcessor`.

    Attributes:
        stopped_samples: None ever are.
    """

    request: Request
    prompt: str | None
    params: PoolingParams
    stopped_samples: list[int] = field(default_factory=list)

    def process(self, output: EngineOutput) -> EmbeddingRequestOutput | None:
        """The request's one output; None as long as the prompt is being computed."""
        if output.finish_reason is None:
            return None
        return EmbeddingRequestOutput(
            request_id=self.request.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            outputs=EmbeddingOutput([] if output.state is None else self.params.finish(output.state)),
            num_cached_tokens=output.num_cached_tokens,
            error=output.error,
        )
