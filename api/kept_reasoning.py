"""Reasoning that clients keep for the server: one word, which comes back with the next request.

As `include: ["reasoning.encrypted_content"]` of the Responses API asks for it, and as the signature of a thinking
block of the Messages API whose text is left out. The text is no secret, since a client may be shown it, and is not
encrypted.
"""

from __future__ import annotations

import base64

_MARK = "reasoning:"


def keep_reasoning(text: str) -> str:
    """The word that a client sends back."""
    return _MARK + base64.b64encode(text.encode()).decode()


def recall_reasoning(word: str) -> str:
    """The text in it; none where another server made it."""
    if not word.startswith(_MARK):
        return ""
    try:
        return base64.b64decode(word.removeprefix(_MARK), validate=True).decode()
    except ValueError:
        return ""
