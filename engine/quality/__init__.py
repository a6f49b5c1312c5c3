"""python -m engine.quality: what each choice of compression costs, measured on a text and on this machine.

`invariants` proves what no choice may cost: that a token depends on nothing but its request; see engine.selftest.
"""
