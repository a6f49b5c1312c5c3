"""Choosing the next token: parameters, the sampler and its counter-based random draw."""
