"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
import struct
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from api.bodies import Embedding, EmbeddingList, EmbeddingUsage
from api.body import json_response
from api.errors import ApiError
from api.generation import check_queue, in_time, new_id
from api.keys import Client, client_of
from api.prompts import encode_prompts, split_prompts
from api.protocol import EmbeddingRequest, decode_request
from api.request_fields import read_timeout, truncated
from api.service import Service
from api.streaming import until_disconnect
from engine.core.limits import MAX_INPUTS
from engine.core.pooling_params import PoolingParams
from engine.errors import RequestError


@dataclass(frozen=True, slots=True)
class EmbeddingJob:
    """A checked request.

    Attributes:
        client: Who asks.
        priority: Lower goes first.
        prompts: Token ids.
        timeout, arrival: As in `Generation`.
    """

    request: EmbeddingRequest
    client: Client
    priority: int
    model: str
    prompts: list[list[int]]
    params: PoolingParams
    timeout: float | None
    arrival: float


async def create_embeddings(service: Service, http_request: Request) -> Response:
    """Answers one request."""
    service.check_ready()
    async with service.bodies.receive(http_request) as body:
        job = await body.read(lambda data: _read_job(service, client_of(http_request), body.arrival, data))
    request_id = new_id("embd-")
    embeddings = await until_disconnect(http_request.receive, _embed(service, job, request_id))
    num_tokens = sum(map(len, job.prompts))
    encode = _base64 if job.request.encoding_format == "base64" else list
    data = [Embedding(index, encode(embedding)) for index, embedding in enumerate(embeddings)]
    answer = EmbeddingList(data, job.model, EmbeddingUsage(num_tokens, num_tokens))
    return json_response(answer, {"x-request-id": request_id})


def _read_job(service: Service, client: Client, arrival: float, body: bytearray) -> EmbeddingJob:
    request = decode_request(body, EmbeddingRequest)
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
    length = service.engine.max_model_len
    try:
        prompts = [
            truncated(request, prompt, length, 0)
            for prompt in encode_prompts(service.engine.tokenizer, inputs)
        ]
    except RequestError as error:
        raise RequestError(f"input: {error}", "input", error.code) from None
    priority, timeout = client.priority(request.priority), read_timeout(request.timeout)
    return EmbeddingJob(request, client, priority, model, prompts, params, timeout, arrival)


def _base64(embedding: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(embedding)}f", *embedding)).decode()


async def _embed(service: Service, job: EmbeddingJob, request_id: str) -> list[list[float]]:
    """The embeddings of all prompts, which share steps; the failure of one aborts all of them.

    Raises:
        RequestError: A prompt that the engine refuses.
        EngineDeadError: The engine has ended.
        ApiError: 500, a prompt failed inside the engine; 429, too much waits already; 503, it has waited too long;
            408, the time that it was given is over.
    """
    check_queue(service, job.prompts, 1)
    places = [service.admission.enter(len(prompt), 1) for prompt in job.prompts]

    async def one(index: int, prompt: list[int]) -> list[float]:
        try:
            embedding = service.engine.embed(
                prompt, job.params, f"{request_id}-{index}", job.priority, owner=job.client.share
            )
            output = await service.metrics.observe_embedding(embedding, job.arrival, len(prompt))
            job.client.charge(len(prompt))
        finally:
            service.admission.leave(places[index])
        if output.error is not None:
            raise ApiError(500, output.error, code="generation_failed")
        return output.outputs.embedding

    tasks = [asyncio.create_task(one(index, prompt)) for index, prompt in enumerate(job.prompts)]
    try:
        # A vector is not there in parts: each counts as waiting to its end, the first one that came for all.
        return await in_time(service, asyncio.gather(*tasks), job.arrival, job.timeout, places[0])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # One that was cancelled before it began has not left.
        for place in places:
            service.admission.leave(place)
