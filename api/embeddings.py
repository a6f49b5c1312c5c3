"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
import struct

from fastapi import Request, Response

from api.bodies import Embedding, EmbeddingList, EmbeddingUsage
from api.body import json_response, read_body
from api.errors import ApiError
from api.generation import new_id
from api.keys import Client, client_of
from api.prompts import encode_prompts, split_prompts
from api.protocol import EmbeddingRequest, decode_request
from api.service import Service
from api.streaming import until_disconnect
from engine.core.pooling_params import PoolingParams

MAX_INPUTS = 2048
"""As many as OpenAI takes in a request."""


async def create_embeddings(service: Service, http_request: Request) -> Response:
    """Answers one request."""
    service.check_ready()
    client = client_of(http_request)
    request = decode_request(await read_body(http_request), EmbeddingRequest)
    model = service.check_model(request.model)
    params = PoolingParams(
        pooling=request.pooling or "last",  # type: ignore[arg-type]  # it checks the word
        dimensions=request.dimensions,
        normalize=request.normalize is not False,
    )
    inputs = split_prompts(request.input, "input")
    if len(inputs) > MAX_INPUTS:
        raise ApiError(
            400, f"input has {len(inputs)} texts; at most {MAX_INPUTS} are taken at a time", param="input"
        )
    prompts = await encode_prompts(service, inputs)
    request_id = new_id("embd-")
    embeddings = await until_disconnect(
        http_request.receive,
        _embed(service, client, prompts, params, request_id, client.priority(request.priority)),
    )
    num_tokens = sum(map(len, prompts))
    encode = _base64 if request.encoding_format == "base64" else list
    data = [Embedding(index, encode(embedding)) for index, embedding in enumerate(embeddings)]
    answer = EmbeddingList(data, model, EmbeddingUsage(num_tokens, num_tokens))
    return json_response(answer, {"x-request-id": request_id})


def _base64(embedding: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(embedding)}f", *embedding)).decode()


async def _embed(
    service: Service,
    client: Client,
    prompts: list[list[int]],
    params: PoolingParams,
    request_id: str,
    priority: int,
) -> list[list[float]]:
    """The embeddings of all prompts, which share steps; the failure of one aborts all of them.

    Raises:
        RequestError: A prompt that the engine refuses.
        EngineDeadError: The engine has ended.
        ApiError: 500, a prompt failed inside the engine.
    """

    async def one(index: int, prompt: list[int]) -> list[float]:
        client.charge(len(prompt))
        embedding = service.engine.embed(
            prompt, params, f"{request_id}-{index}", priority, owner=client.owner
        )
        output = await service.metrics.observe_embedding(embedding, len(prompt))
        if output.error is not None:
            raise ApiError(500, output.error, code="generation_failed")
        return output.outputs.embedding

    tasks = [asyncio.create_task(one(index, prompt)) for index, prompt in enumerate(prompts)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
