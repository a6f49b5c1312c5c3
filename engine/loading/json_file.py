"""JSON files of model directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from engine.loading.file_kinds import check_regular


def read_json(file: Path, required: bool = False) -> dict[str, Any]:
    """The JSON object in `file`; empty if the file is absent and not required."""
    if not file.exists() and not required:
        return {}
    check_regular(file)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: a JSON object is expected")
    return value
