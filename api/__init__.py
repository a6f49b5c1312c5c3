"""The OpenAI-compatible HTTP server in front of an AsyncEngine."""

from api.app import create_app
from api.keys import read_keys
from api.server import serve

__all__ = ["create_app", "read_keys", "serve"]
