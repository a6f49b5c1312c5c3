"""Thoughts that a client wants out of its sight: they ride in the signature, and come back with the next request."""

from __future__ import annotations

import base64

_MARK = "thought:"


def keep_thought(text: str) -> str:
    """The signature of a thinking block whose text is left out."""
    return _MARK + base64.b64encode(text.encode()).decode()


def recall_thought(signature: str) -> str:
    """The thought that a signature holds; none where another server signed."""
    try:
        data = base64.b64decode(signature.removeprefix(_MARK), validate=True)
        return data.decode() if signature.startswith(_MARK) else ""
    except ValueError:
        return ""
