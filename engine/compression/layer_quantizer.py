"""The steps of a recipe on one layer: zeros, scales folded into what feeds each weight, then the weights rounded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from engine.compression.awq import round_clipped, search_scale
from engine.compression.calibration import CalibratedLayer
from engine.compression.clipping import kl_ranges, mse_ranges, percentile_ranges
from engine.compression.gptq import FindGrid, InputStatistics, gptq, output_errors
from engine.compression.lowrank import decompose, refit
from engine.compression.pruning import prune
from engine.compression.recipe import Recipe
from engine.compression.scale_tuning import tune_scales
from engine.compression.smoothquant import (
    fold_into_inputs,
    fold_into_norm,
    fold_into_outputs,
    smoothing_scale,
)
from engine.errors import ConfigError
from engine.kernels.rotation import rotate
from engine.models.modules import ROLES, Role, readers
from engine.quant.plan import SCHEMES
from engine.quant.rounding import Ranges, fit_grid, full_ranges, round_weight
from engine.quant.weight import CodebookWeight, GridWeight, LowRankWeight, RotatedWeight, Weight, to_float
from engine.quant_spec import SchemeSpec

SHRINKAGE = 2.0
"""What is added to the diagonal of GPTQ's second moment, of itself: as though inputs were that much less correlated.

Correlations are learnt from one kind of text, and weights that make up for each other's errors under them do worse
than plain rounding where they do not hold. SmolLM2 in groups of 128, calibrated on Python's help topics, has on
Wikipedia's text (6,200 tokens, 14.05 as floats) a perplexity of 18.75 rounded to nearest; by GPTQ 18.66 without
shrinkage, 17.11 with 0.5 and 16.95 with 2.0 (the first with half as much text).
"""

CHUNK = 8192
"""Rows rounded at once: all steps treat rows alike, but for the threshold of "kl", and a vocabulary has many."""

_LEVELS = 16


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """A layer's new tensors.

    Attributes:
        weights: By module name; float16 where the scheme is "none".
        floats: Norms and biases that a scale was folded into, by tensor name.
        errors: By module name: the output's signal to quantization noise, in dB; of those that are quantized, or
            two factors.
        pruning_errors: The same for the zeros alone, of those that are pruned.
    """

    weights: dict[str, Weight]
    floats: dict[str, torch.Tensor]
    errors: dict[str, float]
    pruning_errors: dict[str, float]


def quantize_layer(layer: CalibratedLayer, recipe: Recipe) -> QuantizedLayer:
    """A layer's tensors by the recipe; zeros and scales go into the layer itself, its weights stay floats."""
    pruning_errors = prune_weights(layer, recipe)
    floats = fold_scales(layer, recipe)
    weights: dict[str, Weight] = {}
    errors: dict[str, float] = {}
    for role in ROLES:
        originals = layer.weights(role.name)
        words = recipe.quant_spec.of(next(iter(originals)))
        if words.is_low_rank:
            found, lost = factorize(originals, layer.statistics[role.name].second_moment, words, recipe)
            weights |= found
            errors |= lost
            continue
        for module, weight in originals.items():
            words = recipe.quant_spec.of(module)
            if words.kind == "none":
                weights[module] = weight.to(torch.float16)
            else:
                moment = layer.statistics[role.name].second_moment
                weights[module], errors[module] = quantize_weight(weight, moment, words, recipe)
    return QuantizedLayer(weights, floats, errors, pruning_errors)


def factorize(
    originals: Mapping[str, torch.Tensor], moment: torch.Tensor, words: SchemeSpec, recipe: Recipe
) -> tuple[dict[str, Weight], dict[str, float]]:
    """Two factors of matrices that are multiplied as one, each rounded: the outer one to make up for the inner one.

    Args:
        originals: [N_i, K] by module.
        moment: [K, K], the second moment of their inputs.
        words: With a rank.

    Returns:
        The weights, and their outputs' signal to noise in dB, by module.
    """
    assert recipe.low_rank is not None
    weight, seen = torch.cat(list(originals.values())), moment if recipe.low_rank.is_whitened else None
    _, exact = decompose(weight, seen, words.rank)
    inner = _factor(exact.float(), moment, words.dense, recipe)
    given = to_float(inner).double()
    fitted = refit(weight, given, seen).float()
    products = given @ moment.double() @ given.t()
    weights: dict[str, Weight] = {}
    errors: dict[str, float] = {}
    sizes = [len(original) for original in originals.values()]
    for (module, original), part in zip(originals.items(), torch.split(fitted, sizes), strict=True):
        new = LowRankWeight(_factor(part, products, words.dense, recipe), inner)
        noise = float(output_errors(new.dequantize() - original, moment).sum())
        errors[module] = _decibels(float(output_errors(original, moment).sum()), noise)
        weights[module] = new
    return weights, errors


def _factor(
    factor: torch.Tensor, moment: torch.Tensor, words: SchemeSpec, recipe: Recipe
) -> torch.Tensor | GridWeight | CodebookWeight:
    if words.kind == "none":
        return factor.to(torch.float16)
    rounded = quantize_weight(factor, moment, words, recipe)[0]
    assert not isinstance(rounded, RotatedWeight), "no scheme of factors is rotated"
    return rounded


def prune_weights(layer: CalibratedLayer, recipe: Recipe) -> dict[str, float]:
    """Sets weights of the layer to zero; by module name, the output's signal to noise in dB."""
    if recipe.pruning is None:
        return {}
    errors = {}
    for role in ROLES:
        moment = layer.statistics[role.name].second_moment
        for module, weight in layer.weights(role.name).items():
            pruned = prune(weight, moment, recipe.pruning)
            signal = float(output_errors(weight, moment).sum())
            errors[module] = _decibels(signal, float(output_errors(pruned - weight, moment).sum()))
            weight.copy_(pruned)
    return errors


def quantize_weight(
    weight: torch.Tensor, moment: torch.Tensor, words: SchemeSpec, recipe: Recipe
) -> tuple[GridWeight | CodebookWeight | RotatedWeight, float]:
    """A weight [N, K] as its scheme stores it, and its output's signal to noise in dB.

    Args:
        moment: [K, K], the second moment of its inputs.
        words: Not "none".

    Raises:
        ConfigError: A zero of a pruned weight would be none as stored: the weights around it are too small.
    """
    shrunk = moment + SHRINKAGE * torch.diag(moment.diagonal())
    if words.is_rotated:
        weight, moment, shrunk = rotate(weight), rotate(rotate(moment).t()), rotate(rotate(shrunk).t())
    parts, signal, noise = [], 0.0, 0.0
    for rows in torch.split(weight, CHUNK):
        part = _round(rows, moment, shrunk, words, recipe)
        if recipe.pruning is not None and bool(part.dequantize()[rows == 0].any()):
            raise ConfigError(f"steps: {recipe.pruning}: {words} cannot hold its zeros exactly; take int8")
        signal += float(output_errors(rows, moment).sum())
        noise += float(output_errors(part.dequantize() - rows, moment).sum())
        parts.append(part)
    stored = _stack(parts)
    if words.is_rotated:
        assert isinstance(stored, GridWeight)
        return RotatedWeight(stored), _decibels(signal, noise)
    return stored, _decibels(signal, noise)


def _decibels(signal: float, noise: float) -> float:
    """The ratio of two mean squares; of none to some it is -inf."""
    return math.inf if noise <= 0 else 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def round_directly(
    weight: torch.Tensor,
    words: SchemeSpec,
    ranges: str | None,
    is_symmetric: bool,
    importance: torch.Tensor | None = None,
    keeps_zero: bool = False,
) -> GridWeight:
    """int4 or int8 to nearest, within each group's range or a narrower one.

    Args:
        ranges: "percentile", "mse" or "kl" for the latter.
        importance: [K], how much each column's error counts under "mse"; None: all do alike.
        keeps_zero: Zeros stay zero to the last bit.
    """
    bits, is_symmetric = (4, is_symmetric) if words.kind == "int4" else (8, True)
    group_size = words.group_size or None
    # int8 rows have float32 scales, as formats and kernels do; groups have fp16, as in Q8_0.
    scale_dtype = torch.float32 if words.kind == "int8" and group_size is None else torch.float16
    match ranges:
        case "percentile":
            found = percentile_ranges(weight, group_size)
        case "mse":
            found = mse_ranges(weight, group_size, bits, is_symmetric, importance, scale_dtype)
        case "kl":
            # A histogram needs more values than a group or most rows have: one threshold for all.
            full, limit = full_ranges(weight, group_size), kl_ranges(weight.reshape(1, -1), None, bits)
            found = Ranges(full.low.clamp(min=limit.low), full.high.clamp(max=limit.high))
        case _:
            found = full_ranges(weight, group_size)
    # So that the zero-point is a code.
    found = Ranges(found.low.clamp(max=0), found.high.clamp(min=0))
    grid = fit_grid(found, bits, is_symmetric, scale_dtype, keeps_zero)
    return round_weight(weight, grid, group_size)


def fold_scales(layer: CalibratedLayer, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Takes scales out of what feeds each weight, a norm or another projection, into the weight.

    Attention's output projection has none: its inputs are shared by the heads of a group.

    Returns:
        The changed norms and biases as they are to be stored, by tensor name.
    """
    floats: dict[str, torch.Tensor] = {}
    # Projections first: what is taken out of them changes the weights that are scaled behind norms.
    for role in ROLES:
        if role.factor is not None:
            scale = _fold_into_weights(layer, [role], recipe)
            if scale is not None:
                floats |= _fold_into_projection(layer, role.factor, scale)
    for name, norm in layer.norms.items():
        scale = _fold_into_weights(layer, readers(name), recipe)
        if scale is not None:
            stored = fold_into_norm(norm.weight - norm.offset, scale, norm.offset)
            norm.weight = stored + norm.offset
            floats[f"{norm.source}.weight"] = stored
    return floats


def _fold_into_weights(layer: CalibratedLayer, roles: Sequence[Role], recipe: Recipe) -> torch.Tensor | None:
    """Multiplies a scale [K] into the weights of roles that have the same inputs; None if they get none."""
    sources = [source for role in roles for source in layer.linears[role.name].sources]
    words = [recipe.quant_spec.of(source) for source in sources]
    weights = [weight for role in roles for weight in layer.weights(role.name).values()]
    statistics = layer.statistics[roles[0].name]
    kinds = {word.dense.kind for word in words}
    if recipe.scaling == "smoothquant" and kinds <= {"none", "int8"}:
        scale = smoothing_scale(statistics.peaks, weights)
    elif recipe.scaling == "awq" and kinds == {"int4"}:
        scale = _search_scale(weights, statistics, words[0], recipe)
    else:
        return None
    for role in roles:
        layer.statistics[role.name] = _divided(statistics, scale)
    for weight in weights:
        weight.copy_(fold_into_inputs(weight, scale))
    return scale


def _search_scale(
    weights: Sequence[torch.Tensor], statistics: InputStatistics, words: SchemeSpec, recipe: Recipe
) -> torch.Tensor:
    if words.is_sparse:
        recipe = _around_zero(recipe)
    words = words.dense
    return search_scale(
        weights,
        statistics.mean_magnitude,
        statistics.second_moment,
        lambda weight: round_directly(weight, words, None, recipe.is_symmetric),
    ).scale


def _fold_into_projection(layer: CalibratedLayer, name: str, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """Divides the outputs of a projection by a scale [N]; its new bias as it is to be stored, by tensor name."""
    module = f"model.layers.{layer.index}.{name}"
    role = next(role.name for role in ROLES if module in layer.weights(role.name))
    weight, bias = layer.weights(role)[module], layer.biases(role).get(module)
    new, new_bias = fold_into_outputs(weight, bias, scale)
    weight.copy_(new)
    if bias is None or new_bias is None:
        return {}
    bias.copy_(new_bias)
    return {f"{module}.bias": new_bias}


def _divided(statistics: InputStatistics, scale: torch.Tensor) -> InputStatistics:
    """The statistics of inputs divided by a scale [K]."""
    products = statistics.products / torch.outer(scale, scale)
    return InputStatistics(
        products, statistics.magnitudes / scale, statistics.peaks / scale, statistics.num_tokens
    )


def _round(
    weight: torch.Tensor, moment: torch.Tensor, shrunk: torch.Tensor, words: SchemeSpec, recipe: Recipe
) -> GridWeight | CodebookWeight:
    """A step is for some kinds of schemes; in a mixed specification others are rounded to nearest."""
    round_weight = SCHEMES[words.kind].round
    importance = moment.diagonal() if bool(moment.diagonal().any()) else None
    if round_weight is not None:
        return round_weight(weight, importance)
    keeps_zeros = recipe.pruning is not None or words.is_sparse
    if words.is_sparse:
        words, recipe = words.dense, _around_zero(recipe)
    if words.kind == "int4" and recipe.ranges == "clip":
        group_size = words.group_size or weight.shape[1]
        find_grid = _find_grid(recipe.is_symmetric, keeps_zeros)
        rounded = round_clipped(weight, moment, find_grid, group_size, _LEVELS)
    else:
        rounded = round_directly(weight, words, recipe.ranges, recipe.is_symmetric, importance, keeps_zeros)
    if words.kind == "int4" and recipe.compensates:
        kept = weight != 0 if keeps_zeros else None
        rounded = gptq(weight, shrunk, rounded, rounded.group_size, _LEVELS, by_activation=True, kept=kept)
    if words.kind == "int4" and recipe.tunes:
        # A symmetric grid stays one that is only stretched. GPTQ's codes are better than nearest ones.
        shifts, keeps_codes = not recipe.is_symmetric, recipe.compensates
        return tune_scales(weight, rounded, shrunk, _LEVELS, shifts=shifts, keeps_codes=keeps_codes)
    return rounded


def _around_zero(recipe: Recipe) -> Recipe:
    """The same with codes around zero: a sparse scheme has no zero-points."""
    return replace(recipe, is_symmetric=True)


def _find_grid(is_symmetric: bool, keeps_zeros: bool) -> FindGrid:
    """The grid of a group's values [N, g]: their range, widened to hold zero, so that its zero-point is a code."""

    def find(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ranges = Ranges(values.amin(dim=1).clamp(max=0), values.amax(dim=1).clamp(min=0))
        grid = fit_grid(ranges, 4, is_symmetric, keeps_zero=keeps_zeros)
        assert grid.minimum is not None
        return grid.scale, grid.minimum

    return find


def _stack(parts: Sequence[GridWeight | CodebookWeight]) -> GridWeight | CodebookWeight:
    """One weight of the rows of several of a kind."""
    first = parts[0]
    codes = torch.cat([part.codes for part in parts])
    scales = [part.scale for part in parts if part.scale is not None]
    if isinstance(first, CodebookWeight):
        books = [part.codebook for part in parts if isinstance(part, CodebookWeight)]
        codebook = first.codebook if len(first.codebook) == 1 else torch.cat(books)
        return CodebookWeight(codes, codebook, torch.cat(scales) if scales else None, first.group_size)
    minimums = [part.minimum for part in parts if isinstance(part, GridWeight) and part.minimum is not None]
    minimum = torch.cat(minimums) if minimums else None
    return GridWeight(codes, torch.cat(scales), minimum, first.group_size)
