"""The OpenAI-compatible HTTP server in front of an AsyncEngine."""

from api.app import create_app
from api.server import serve

__all__ = ["create_app", "serve"]
