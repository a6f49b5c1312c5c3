"""OpenAI's Responses API: /v1/responses, what it stores, and what Codex CLI asks of a list of models."""
