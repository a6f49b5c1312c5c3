"""POST /tokenize, /detokenize and /apply-template: prompts as the model gets them, without an answer."""

from __future__ import annotations

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from api.bodies import Prompt, Tokens
from api.body import json_response
from api.errors import ApiError, not_supported
from api.openai_messages import named_as_in_chat, read_conversation
from api.protocol import (
    NULL,
    ChatCompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeRequest,
    decode_request,
    read_members,
)
from api.request_fields import truncated
from api.sampling import requested_max_tokens
from api.service import Service
from engine.frontend.chat_format import ChatTurn


async def tokenize(service: Service, http_request: Request) -> Response:
    """Answers with the tokens of a prompt, or of a chat's prompt."""
    service.check_ready()
    async with service.bodies.receive(http_request) as body:
        return await body.read(lambda data: json_response(_tokens(service, data)))


def _tokens(service: Service, body: bytearray) -> Tokens:
    kind: type[TokenizeRequest | TokenizeChatRequest]
    kind = TokenizeChatRequest if _has_messages(body) else TokenizeRequest
    request = decode_request(body, kind)
    service.check_model(request.model)
    tokenizer = service.engine.tokenizer
    if isinstance(request, TokenizeChatRequest):
        turn, max_model_len = _turn(service, request), service.engine.max_model_len
        max_tokens = requested_max_tokens(request, least=0)
        token_ids = truncated(request, turn.prompt_token_ids, max_model_len, max_tokens)
    else:
        token_ids = tokenizer.encode(request.prompt, request.add_special_tokens is not False)
    pieces = [tokenizer.piece(token_id) for token_id in token_ids] if request.return_token_strs else UNSET
    return Tokens(len(token_ids), service.engine.max_model_len, token_ids, pieces)


async def detokenize(service: Service, http_request: Request) -> Response:
    """Answers with the text of tokens, special ones too."""
    service.check_ready()
    async with service.bodies.receive(http_request) as body:
        return await body.read(lambda data: json_response(_text(service, data)))


def _text(service: Service, body: bytearray) -> Prompt:
    request = decode_request(body, DetokenizeRequest)
    service.check_model(request.model)
    tokenizer = service.engine.tokenizer
    for token_id in request.tokens:
        if not 0 <= token_id < tokenizer.vocab_size:
            raise ApiError(
                400,
                f"tokens holds token id {token_id}; the vocabulary has ids 0 to {tokenizer.vocab_size - 1}",
                param="tokens",
            )
    return Prompt(tokenizer.decode(request.tokens, skip_special_tokens=False))


async def apply_template(service: Service, http_request: Request) -> Response:
    """Answers with the text that the model gets for a chat."""
    service.check_ready()
    async with service.bodies.receive(http_request) as body:
        return await body.read(lambda data: json_response(_template_text(service, data)))


def _template_text(service: Service, body: bytearray) -> Prompt:
    request = decode_request(body, ChatCompletionRequest)
    service.check_model(request.model)
    if request.truncate_prompt_tokens is not None:
        raise not_supported("truncate_prompt_tokens of a text", "truncate_prompt_tokens")
    return Prompt(_turn(service, request).prompt)


def _turn(service: Service, request: ChatCompletionRequest) -> ChatTurn:
    with named_as_in_chat(request):
        return read_conversation(request, None).turn(service.engine.chat_format)


def _has_messages(body: bytearray) -> bool:
    try:
        return read_members(body).get("messages", NULL) != NULL
    except ApiError:
        # What it is will be said when it is read.
        return False
