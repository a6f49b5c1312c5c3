"""SmoothQuant: moves the range of outlier channels from the activations into the weights.

    (x · diag(s)⁻¹) (W · diag(s))ᵀ = x Wᵀ             s_k = max|x_k| ** alpha / max|W_k| ** (1 - alpha)

(Xiao et al. 2022, arXiv:2211.10438, equations 3 and 4.) The division costs nothing: it is folded into what makes the
activations. The functions compute in float32 or float64 and return that; the caller rounds to what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.compression.gptq import widen


def smoothing_scale(peaks: torch.Tensor, weights: Sequence[torch.Tensor], alpha: float = 0.5) -> torch.Tensor:
    """The scale s [K] float64 for weights [N, K] that share their input; 1 where a channel is all zeros.

    Args:
        peaks: [K], the maximum of |x| over the calibration tokens.
        alpha: Share of the difficulty that goes to the weights: 0 evens out the weights, 1 the activations.

    Raises:
        ValueError: A peak is not finite.
    """
    if not peaks.isfinite().all():
        raise ValueError(
            "smoothquant: the inputs' peaks are not finite; check the calibration inputs for NaN"
        )
    activation = peaks.double()
    weight = torch.stack([weight.abs().amax(dim=0).double() for weight in weights]).amax(dim=0)
    scale = activation**alpha / weight ** (1 - alpha)
    return torch.where((activation > 0) & (weight > 0), scale, 1.0)


def fold_into_norm(norm: torch.Tensor, scale: torch.Tensor, offset: float) -> torch.Tensor:
    """The weight [K] of the norm before, so that it returns its output divided by the scale [K].

    Args:
        norm: As stored.
        offset: What is added to the stored weight: 1 for Gemma's norms, else 0.
    """
    norm = widen(norm)
    return (norm + offset) / scale.to(norm.dtype) - offset


def fold_into_outputs(
    weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight [N, K] and bias [N] of the layer before, so that it returns its output divided by the scale [N].

    For the layers whose output reaches the next one through products alone: an MLP's up projection before down.
    """
    weight = widen(weight)
    scale = scale.to(weight.dtype)
    return weight / scale[:, None], None if bias is None else widen(bias) / scale


def fold_into_inputs(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weight W · diag(s) [N, K] that takes inputs divided by the scale [K]."""
    weight = widen(weight)
    return weight * scale.to(weight.dtype)
