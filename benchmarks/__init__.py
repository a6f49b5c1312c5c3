"""Benchmarks: one script a question; `python -m benchmarks.serving` and `python -m benchmarks.throughput`."""
