"""Quantization: schemes (how a weight is stored and multiplied) and the algorithms that find the numbers."""
