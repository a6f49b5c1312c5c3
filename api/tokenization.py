"""POST /tokenize, /detokenize and /apply-template: prompts as the model gets them, without an answer."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import Request, Response
from msgspec import UNSET

from api.bodies import Prompt, Tokens
from api.body import json_response, read_body
from api.conversation import begin_turn
from api.errors import ApiError, not_supported
from api.openai_messages import named_as_in_chat, read_conversation
from api.prompts import encode_prompts
from api.protocol import (
    ChatCompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeRequest,
    decode_request,
)
from api.request_fields import truncated
from api.sampling import requested_max_tokens
from api.service import Service
from engine.frontend.chat_format import ChatTurn


async def tokenize(service: Service, http_request: Request) -> Response:
    """Answers with the tokens of a prompt, or of a chat's prompt."""
    service.check_ready()
    body = await read_body(http_request)
    kind: type[TokenizeRequest | TokenizeChatRequest]
    kind = TokenizeChatRequest if _has_messages(body) else TokenizeRequest
    request = decode_request(body, kind)
    service.check_model(request.model)
    tokenizer = service.engine.tokenizer
    if isinstance(request, TokenizeChatRequest):
        turn, max_model_len = await _turn(service, request), service.engine.max_model_len
        max_tokens = requested_max_tokens(request, least=0)
        token_ids = truncated(request, turn.prompt_token_ids, max_model_len, max_tokens)
    else:
        [token_ids] = await encode_prompts(service, [request.prompt], request.add_special_tokens is not False)
    pieces = [tokenizer.piece(token_id) for token_id in token_ids] if request.return_token_strs else UNSET
    return json_response(Tokens(len(token_ids), service.engine.max_model_len, token_ids, pieces))


async def detokenize(service: Service, http_request: Request) -> Response:
    """Answers with the text of tokens, special ones too."""
    service.check_ready()
    request = decode_request(await read_body(http_request), DetokenizeRequest)
    service.check_model(request.model)
    tokenizer = service.engine.tokenizer
    for token_id in request.tokens:
        if not 0 <= token_id < tokenizer.vocab_size:
            raise ApiError(
                400,
                f"tokens holds token id {token_id}; the vocabulary has ids 0 to {tokenizer.vocab_size - 1}",
                param="tokens",
            )
    text = await asyncio.to_thread(tokenizer.decode, request.tokens, skip_special_tokens=False)
    return json_response(Prompt(text))


async def apply_template(service: Service, http_request: Request) -> Response:
    """Answers with the text that the model gets for a chat."""
    service.check_ready()
    request = decode_request(await read_body(http_request), ChatCompletionRequest)
    service.check_model(request.model)
    if request.truncate_prompt_tokens is not None:
        raise not_supported("truncate_prompt_tokens of a text", "truncate_prompt_tokens")
    return json_response(Prompt((await _turn(service, request)).prompt))


async def _turn(service: Service, request: ChatCompletionRequest) -> ChatTurn:
    with named_as_in_chat(request):
        return await begin_turn(service, read_conversation(request, None))


class _Kind(msgspec.Struct):
    messages: Any = None


def _has_messages(body: bytes) -> bool:
    try:
        return msgspec.json.decode(body, type=_Kind).messages is not None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # What it is will be said when it is read.
        return False
