"""Makes smaller checkpoints, offline: recipes of scaling and rounding steps, calibrated layer by layer."""
