"""Decoder-only models: their configuration and the one decoder that all families share."""
