"""python -m engine.quality: what each choice of compression costs, measured on a text and on this machine."""
