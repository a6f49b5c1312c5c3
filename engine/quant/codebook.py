"""Codebooks: grids of sixteen values that are not evenly spaced.

    NF4       w[n, k] ≈ codebook[0, codes[n, k]] * absmax[n, k // block_size]    one table, quantiles of the normal
    k-means   w[n, k] ≈ codebook[n, codes[n, k]]                                 a table for each row, fitted to it

Sources: Dettmers et al. 2023, "QLoRA", section 3 and appendix E (arXiv:2305.14314); Kim et al. 2023, "SqueezeLLM",
section 4.1 (arXiv:2306.07629); Lloyd 1982, "Least squares quantization in PCM"; Wang and Song 2011,
"Ckmeans.1d.dp: Optimal k-means clustering in one dimension by dynamic programming" (R Journal 3/2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.quant.rounding import group_pieces, require_finite, require_importance
from engine.quant.weight import CodebookWeight

SIZE = 16

# The probability at the outermost values: the middle of 1 - 1/30 and 1 - 1/32, as bitsandbytes rounds it.
_NF4_OUTERMOST = 0.9677083

# A row is cut into so many runs to find a start for its clusters.
_RUNS = 128

# Lloyd's steps at most; long rows change by ever less.
_ITERATIONS = 100

# So many rows are clustered at a time, fewer if they have more values in all: 2 MB for the gains of their runs, which
# are read fourteen times and stay in the processor's cache, and less than a hundred bytes for each value.
_ROWS = 16
_VALUES = 1 << 21


def nf4_values() -> torch.Tensor:
    """NF4's values, [16] float32, ascending from -1 to 1, the eighth 0.

    Quantiles of the normal distribution at even distances of probability, 0.5 to 0.9677083 in eight steps on the
    positive side and mirrored in seven on the negative one, divided by the largest.
    """
    reach = _NF4_OUTERMOST - 0.5
    positive = torch.special.ndtri(0.5 + reach * torch.arange(1, 9, dtype=torch.float64) / 8)
    negative = -torch.special.ndtri(0.5 + reach * torch.arange(7, 0, -1, dtype=torch.float64) / 7)
    return (torch.cat((negative, torch.zeros(1), positive)) / positive[-1]).float()


def round_to_nf4(weight: torch.Tensor, block_size: int = 64) -> CodebookWeight:
    """A weight [N, K] with each element at the nearest of its block's sixteen values.

    Args:
        weight: [N, K] float, any K.
        block_size: Columns that share an absmax.

    Raises:
        ValueError: As `full_ranges`, of `engine.quant.rounding`.
    """
    require_finite(weight)
    values = nf4_values().to(weight.device)
    borders = (values[1:] + values[:-1]) / 2
    codes, maxima = [], []
    for blocks in group_pieces(weight.float().contiguous(), block_size):
        absmax = blocks.abs().amax(dim=2)
        # A block of zeros has zeros for codes' values whatever it is divided by.
        divisor = torch.where(absmax > 0, absmax, 1.0)
        codes.append(torch.bucketize(blocks / divisor[:, :, None], borders).to(torch.uint8).flatten(1))
        maxima.append(absmax)
    return CodebookWeight(torch.cat(codes, dim=1), values[None], torch.cat(maxima, dim=1), block_size)


def cluster_rows(weight: torch.Tensor, importance: torch.Tensor | None = None) -> CodebookWeight:
    """A codebook for each row that makes  sum_k importance[k] * (w[n, k] - codebook[n, codes[n, k]])²  small.

    Lloyd's algorithm from a good start. Each row is cut into at most 128 runs of neighbouring values, the best
    sixteen clusters of whole runs are found by dynamic programming, and Lloyd's steps move their borders between
    single values. A row of at most 128 different values gets the optimum, one of at most sixteen keeps its values,
    but for the codebook's rounding to fp16. Lloyd's algorithm from quantiles alone ends far from it: on rows of 300
    normal values with a squared error 1.6 times the optimum's, with outliers among them 3 times.

    Codes are the nearest values of the codebook as it is stored. Nothing is left to chance, and a row's result does
    not depend on other rows. Rows that share a codebook are one row here: `weight.view(N // rows, rows * K)`.

    Args:
        weight: [N, K] float, any K.
        importance: [K], at least 0: the factor of each column's squared error; None weighs all alike. SqueezeLLM's is
            the mean square of the loss's gradient.

    Raises:
        ValueError: A value beyond fp16, an importance out of bounds, or as `full_ranges`.
    """
    require_finite(weight)
    columns = weight.shape[1]
    if importance is None:
        importance = torch.ones(columns, device=weight.device)
    require_importance(importance, columns)
    beyond = weight.abs() > torch.finfo(torch.float16).max
    if bool(beyond.any()):
        row, column = beyond.nonzero()[0].tolist()
        raise ValueError(f"row {row}, column {column}: {float(weight[row, column]):g} is beyond fp16's range")

    codes, codebooks = [], []
    for rows in torch.split(weight.float().contiguous(), max(1, min(_ROWS, _VALUES // columns))):
        sums = _Sums.of(rows, importance.double())
        codebook = _lloyd(sums, _start(sums)).to(torch.float16)
        codebooks.append(codebook)
        borders = _borders(codebook.float())
        codes.append(torch.searchsorted(borders, rows).to(torch.uint8))
    return CodebookWeight(torch.cat(codes), torch.cat(codebooks), None, columns)


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sorted rows, and the sums of what lies before each position.

    The values nearest to a centre lie side by side in a sorted row: the sums of any cluster are two differences.

    Attributes:
        ordered: [R, K] float32, ascending.
        weight: [R, K + 1] float64, sums of the importance.
        moment: [R, K + 1] float64, sums of importance times value.
    """

    ordered: torch.Tensor
    weight: torch.Tensor
    moment: torch.Tensor

    @staticmethod
    def of(rows: torch.Tensor, importance: torch.Tensor) -> _Sums:
        """The sums of rows [R, K] float32 under an importance [K] float64."""
        ordered, order = rows.sort(dim=1)
        weight = importance[order]
        moment = weight * ordered
        pad = torch.nn.functional.pad
        return _Sums(ordered, pad(weight.cumsum(dim=1), (1, 0)), pad(moment.cumsum(dim=1), (1, 0)))


def _start(sums: _Sums) -> torch.Tensor:
    """The means of the best sixteen clusters of whole runs → [R, 16] float32, ascending.

    Least squared error is the largest sum of moment² / weight over clusters. With gain[s, e] that of the runs from
    s to before e, the best first c clusters of the first e runs have  best[c, e] = max_s best[c - 1, s] + gain[s, e].
    """
    edges = _run_edges(sums)
    weight, moment = sums.weight.gather(1, edges), sums.moment.gather(1, edges)
    # By start, then end.
    gain = (moment[:, None, :] - moment[:, :, None]).square_()
    room = torch.sub(weight[:, None, :], weight[:, :, None])
    gain /= room
    # A cluster of no weight gains nothing; one that ends before it starts is none.
    gain.nan_to_num_(nan=0.0, posinf=0.0)
    gain += torch.full_like(gain[0], -torch.inf).tril_(-1)

    bests = [gain[:, 0, :]]
    for _ in range(SIZE - 2):
        # In memory that is there: new pages would take longer than the sums.
        bests.append(torch.add(gain, bests[-1][:, :, None], out=room).amax(dim=1))
    # Walk back from the end: only there does it matter where the maxima are.
    end = torch.full_like(edges[:, :1], _RUNS)
    borders = []
    for best in reversed(bests):
        last = gain.gather(2, end[:, None, :].expand(-1, _RUNS + 1, -1))[:, :, 0]
        end = (last + best).argmax(dim=1, keepdim=True)
        borders.append(end)
    inner = edges.gather(1, torch.cat(borders[::-1], dim=1))
    weight, moment = _between(sums, inner)
    # An empty cluster lies at its left end.
    left = torch.nn.functional.pad(inner, (1, 0)).clamp_(max=sums.ordered.shape[1] - 1)
    return torch.where(weight > 0, moment / weight, sums.ordered.gather(1, left).double()).float()


def _run_edges(sums: _Sums) -> torch.Tensor:
    """Where each of 128 runs starts, and the end: positions [R, 129] int64, ascending, some runs empty.

    A run is one of the different values where there are no more than runs. Else half of the edges are quantiles,
    which part the bulk of the row, and half lie at even distances of value, which part outliers.
    """
    ordered = sums.ordered
    device, columns = ordered.device, ordered.shape[1]
    rank = torch.nn.functional.pad((ordered.diff(dim=1) > 0).cumsum(dim=1), (1, 0))
    parts = torch.arange(_RUNS, device=device).expand(len(ordered), _RUNS).contiguous()
    by_rank = torch.searchsorted(rank, parts)
    span = (ordered[:, -1:] - ordered[:, :1]).double()
    place = (ordered - ordered[:, :1]) / torch.where(span > 0, span, 1.0)
    place += sums.weight[:, :-1] / sums.weight[:, -1:]
    by_place = torch.searchsorted(place, parts * (2 / _RUNS))
    edges = torch.where(rank[:, -1:] < _RUNS, by_rank, by_place)
    return torch.nn.functional.pad(edges, (0, 1), value=columns)


def _lloyd(sums: _Sums, centres: torch.Tensor) -> torch.Tensor:
    """Centres [R, 16] moved to the means of the values nearest to them until nothing moves."""
    for _ in range(_ITERATIONS):
        edges = torch.searchsorted(sums.ordered, _borders(centres), right=True)
        weight, moment = _between(sums, edges)
        # A centre without values stays where it is.
        moved = torch.where(weight > 0, moment / weight, centres.double()).float()
        if torch.equal(moved, centres):
            break
        centres = moved
    # Differences of sums may be off by so little that equal centres have changed places.
    return centres.sort(dim=1).values


def _between(sums: _Sums, edges: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights and moments [R, 16] float64 of the clusters that fifteen positions [R, 15] part."""
    edges = torch.nn.functional.pad(edges, (1, 0))
    edges = torch.nn.functional.pad(edges, (0, 1), value=sums.ordered.shape[1])
    return sums.weight.gather(1, edges).diff(dim=1), sums.moment.gather(1, edges).diff(dim=1)


def _borders(centres: torch.Tensor) -> torch.Tensor:
    """Halfway between neighbours: [R, 16] ascending → [R, 15]."""
    return (centres[:, 1:] + centres[:, :-1]) / 2
