"""Tensor parallelism: how layers are cut over ranks, what ranks say to each other, and how they are started."""
