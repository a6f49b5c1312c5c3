"""Attention over the paged cache: bodies in torch, C and Triton, and the cache they read."""
