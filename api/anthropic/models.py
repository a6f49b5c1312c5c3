"""The list of models with the members that Anthropic's clients read, beside OpenAI's."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

import msgspec
from starlette.requests import Request

from api.bodies import Model, ModelList


class AnthropicModel(Model, kw_only=True):
    """Attributes:
    created_at: When, as RFC 3339 writes it.
    max_input_tokens: What the context holds beside one token of an answer.
    """

    display_name: str
    created_at: str
    max_input_tokens: int
    max_tokens: int
    type: Literal["model"] = "model"
    lifecycle: Literal["active"] = "active"


class AnthropicModelList(ModelList, kw_only=True):
    """One page, which holds all."""

    first_id: str
    last_id: str
    has_more: bool = False


def is_anthropics(request: Request) -> bool:
    """Whether one of Anthropic's clients asks: they all say which version they speak."""
    return "anthropic-version" in request.headers


def anthropic_model(model: Model) -> AnthropicModel:
    return AnthropicModel(
        **msgspec.structs.asdict(model),
        display_name=model.id,
        created_at=datetime.fromtimestamp(model.created, UTC).isoformat(),
        max_input_tokens=model.max_model_len - 1,
        max_tokens=model.max_model_len - 1,
    )


def anthropic_models(models: list[Model]) -> AnthropicModelList:
    return AnthropicModelList(
        [anthropic_model(model) for model in models], first_id=models[0].id, last_id=models[-1].id
    )
