"""Queries, keys and values of a layer as a tensor over heads: what Tucker and CP lose of it, and SVD at equal bytes.

    python -m benchmarks.tensor_decompositions llama --layers 2,15

The tensor is [heads, head_dim, K], the heads of q_proj, k_proj and v_proj one after the other. SVD is that of the
matrix [heads * head_dim, K], as `engine.compression.lowrank` makes it; Tucker has a core and three factors, CP three
factors. Each gets the largest ranks whose numbers fit into as many as SVD has. Printed is the share of the squared
norm that is lost. Tensorly computes Tucker and CP: pip install tensorly.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from tqdm import tqdm

from engine.compression.lowrank import decompose, energies
from engine.errors import ConfigError, EngineError
from engine.loading.checkpoint import Checkpoint, open_checkpoint
from engine.loading.model_config import read_model_config
from engine.loading.resolve import resolve_model
from engine.models.modules import ROLES
from engine.quant.weight import to_float

SHARES = (0.3, 0.5, 0.8)
"""Of the matrix's numbers: three ranks each."""

ITERATIONS = 20
"""Of alternating least squares."""


def stacked(checkpoint: Checkpoint, layer: int, head_dim: int) -> torch.Tensor:
    """The tensor [heads, head_dim, K] float64 of a layer."""
    modules = ROLES[0].modules(f"model.layers.{layer}")
    weights = [to_float(checkpoint.tensor(f"{module}.weight")).double() for module in modules]
    matrix = torch.cat(weights)
    return matrix.view(-1, head_dim, matrix.shape[1])


def tucker_ranks(tensor: torch.Tensor, numbers: int) -> tuple[int, int, int]:
    """The ranks whose core and factors have at most so many numbers, and of these the ones of the least bound on what
    is lost: the sum of what each mode's singular values leave out (De Lathauwer et al. 2000, property 10).
    """
    heads, rows, columns = tensor.shape
    unfolded = [tensor.movedim(mode, 0).flatten(1) for mode in range(3)]
    found = [energies(matrix, None) for matrix in unfolded]
    tails = [[0.0, *one.tolist()] for one in found]
    tails = [(sum(one) - torch.tensor(one).cumsum(0)).tolist() for one in tails]
    fitting = {}
    for first in range(1, heads + 1):
        for second in range(1, rows + 1):
            left = numbers - first * heads - second * rows
            third = min(columns, first * second, left // (first * second + columns))
            if third >= 1:
                bound = tails[0][first] + tails[1][second] + tails[2][third]
                fitting[first, second, third] = bound
    return min(fitting, key=fitting.__getitem__)


def lost(tensor: torch.Tensor, approximation: torch.Tensor) -> float:
    """The share of the squared norm that is lost."""
    return float((tensor - approximation).square().sum() / tensor.square().sum())


def compare(tensor: torch.Tensor, share: float) -> list[str]:
    """A row of the table: SVD, Tucker and CP within a share of the tensor's numbers."""
    import tensorly
    from tensorly.decomposition import parafac, tucker

    tensorly.set_backend("pytorch")
    heads, rows, columns = tensor.shape
    matrix = tensor.flatten(0, 1)
    rank = int(share * tensor.numel() / (len(matrix) + columns))
    numbers = rank * (len(matrix) + columns)
    outer, inner = decompose(matrix, None, rank)
    cells = [f"{share}", f"{numbers}", f"{rank}", f"{lost(matrix, outer @ inner):.3f}"]
    ranks = tucker_ranks(tensor, numbers)
    core = tucker(tensor, rank=list(ranks), n_iter_max=ITERATIONS)
    cells += ["×".join(map(str, ranks)), f"{lost(tensor, tensorly.tucker_to_tensor(core)):.3f}"]
    terms = numbers // (heads + rows + columns)
    factors = parafac(tensor, rank=terms, n_iter_max=ITERATIONS, init="random", random_state=0)
    return [*cells, f"{terms}", f"{lost(tensor, tensorly.cp_to_tensor(factors)):.3f}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 0, or 2 if it cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tensor_decompositions", description=__doc__)
    parser.add_argument("model", help="as for engine.serve")
    parser.add_argument("--layers", default="0", help="with commas (default: 0)")
    options = parser.parse_args(arguments)
    try:
        import tensorly  # noqa: F401
    except ImportError:
        print("error: tensorly is not installed: pip install tensorly", file=sys.stderr)
        return 2
    try:
        checkpoint = open_checkpoint(resolve_model(options.model))
        head_dim = read_model_config(checkpoint).head_dim
        layers = [int(layer) for layer in options.layers.split(",") if layer.isdecimal()]
        if not layers:
            raise ConfigError(f"layers: {options.layers!r} is no list of numbers, like 0,15")
        print("| layer | share | numbers | rank | SVD loses | ranks | Tucker loses | terms | CP loses |")
        print("|" + "---:|" * 9)
        for layer in layers:
            tensor = stacked(checkpoint, layer, head_dim)
            for share in tqdm(SHARES, desc=f"Layer {layer}", leave=False):
                tqdm.write(f"| {layer} | " + " | ".join(compare(tensor, share)) + " |")
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
