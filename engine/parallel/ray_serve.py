"""serve run engine.parallel.ray_serve:build: the name by which users know `api.ray_serve`."""

from __future__ import annotations

from api.ray_serve import app, build

__all__ = ["app", "build"]
