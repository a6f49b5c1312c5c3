"""The blocks that models are written with."""
