"""Schemes: how a weight is stored and multiplied."""
