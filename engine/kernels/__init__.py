"""One file an operation: its reference, its bodies in torch and C, and the public function that picks one by device.

Its Triton body stands beside it in *_triton.py, imported where it is used: a CPU's start does not wait for Triton.
"""
