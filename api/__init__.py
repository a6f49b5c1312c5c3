"""The OpenAI-compatible HTTP server in front of an AsyncEngine."""

from api.admission import QueueLimits
from api.app import create_app
from api.keys import read_keys
from api.server import serve

__all__ = ["QueueLimits", "create_app", "read_keys", "serve"]
