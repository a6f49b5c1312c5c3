"""The random draw: from a key and token ids to noise, in torch.

Two rounds of the 32-bit finalizer of MurmurHash3 (Appleby 2011) mix the key of `engine.core.random` with every
token id, and the result becomes Gumbel noise: adding it to the logits and taking the largest draws from the softmax
(Gumbel 1954).
"""

from __future__ import annotations

import torch

from engine.core.random import signed32
from engine.kernels.float_math import log


def gumbel_noise(key: tuple[int, int], token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, -log(-log(1 - u)), for each of `token_ids` ([...] integer), float32 of their shape."""
    u = uniform_noise(key, token_ids)
    # log(1 - u) = log(rounded) + lost / (1 - u) to first order, where `lost` is what rounding 1 - u has lost: it is
    # exact, at most 2^-25, and 0 from u = 1/2 on, so that 1 + u may stand for 1 / (1 - u). That keeps the digits of a
    # small u, whose exponential is small, and the smallest wins.
    rounded = 1.0 - u
    lost = (1.0 - rounded) - u
    return -log(-(log(rounded) + (lost + lost * u)))


def uniform_noise(key: tuple[int, int], token_ids: torch.Tensor) -> torch.Tensor:
    """Uniform noise between 2^-33 and 1 - 2^-24 for each of `token_ids` ([...] integer), float32."""
    low, high = key
    bits = _mix32(_mix32(token_ids.to(torch.int32) ^ low) + high)
    uniform = ((bits.to(torch.int64) & 0xFFFFFFFF).to(torch.float32) + 0.5) * 2.0**-32
    return uniform.clamp_(max=1.0 - 2.0**-24)


def _mix32(bits: torch.Tensor) -> torch.Tensor:
    # int32 products wrap around; >> is arithmetic, so the copied sign bits are masked off.
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * signed32(0x85EBCA6B)
    bits = (bits ^ ((bits >> 13) & 0x7FFFF)) * signed32(0xC2B2AE35)
    return bits ^ ((bits >> 16) & 0xFFFF)
