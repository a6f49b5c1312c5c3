"""serve run engine.parallel.ray_serve:build: the name by which users know `api.ray_serve`."""

from __future__ import annotations

from engine.installation import check_api

check_api()

from api.ray_serve import build  # noqa: E402

__all__ = ["build"]
