"""What a layer whose inputs are shared costs the ranks: bytes that each sends, and receives as many, for a token.

    n ranks, K input and N output features; an exchange is as cheap as it can be (a ring, or each with each)

    gathered         inputs and outputs gathered, float32         (n - 1) / n * (4 K + 4 N)
    integer sums     the largest of each 32 inputs gathered,      (n - 1) / n * (K / 8 + 4 terms N + 4 N)
                     int32 sums added where a share of the
                     outputs is finished, and these gathered
    float32 sums     all-reduce                                   (n - 1) / n * 8 N
    bf16 sums        all-reduce                                   (n - 1) / n * 4 N

The first two have the bits of one rank. With activations of two terms sums are fewer bytes than gathering where
K > 2.06 N, with those of one where K > 1.03 N: behind an MLP, but not behind attention.

                      SmolLM2-135M, n = 3                Llama-3.1-70B, n = 8
                      o_proj       down_proj             o_proj        down_proj
    K, N              576, 576     1536, 576             8192, 8192    28672, 8192
    gathered          3,072        5,632                 57,344        129,024
    integer sums      4,656        4,736                 86,912        89,152
     with one term    3,120        3,200                 58,240        60,480
    float32 sums      3,072        3,072                 57,344        57,344
    bf16 sums         1,536        1,536                 28,672        28,672

This is what crosses links; what ranks hand over, `engine.parallel.exchanges` and `TensorGroup.num_bytes` count.

Source of the all-reduce's 2 (n - 1) / n: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for
clusters of workstations".
"""

from __future__ import annotations

from engine.kernels.quantize import SPREAD_BLOCK

FLOAT_BYTES = 4
"""Bytes of a float32, and of a sum of integers."""


def gather_bytes(num_bytes: int, size: int) -> int:
    """What a rank sends so that all have the ranks' parts of num_bytes; or of num_bytes of its own, if each rank gets
    another part of them.
    """
    return num_bytes // size * (size - 1)


def all_reduce_bytes(num_bytes: int, size: int) -> int:
    """What a rank sends so that all have the sum of their num_bytes."""
    return 2 * num_bytes * (size - 1) // size


def gathered_bytes(in_features: int, out_features: int, size: int) -> int:
    """What a rank sends for a token of a layer whose inputs and outputs are gathered."""
    return gather_bytes(FLOAT_BYTES * in_features, size) + gather_bytes(FLOAT_BYTES * out_features, size)


def integer_sum_bytes(in_features: int, out_features: int, size: int, terms: int) -> int:
    """What a rank sends for a token of a layer whose products are summed as integers.

    Args:
        terms: Of its activations.
    """
    maxima = gather_bytes(FLOAT_BYTES * in_features // SPREAD_BLOCK, size)
    sums = gather_bytes(FLOAT_BYTES * terms * out_features, size)
    return maxima + sums + gather_bytes(FLOAT_BYTES * out_features, size)


def float_sum_bytes(out_features: int, size: int, item_bytes: int = FLOAT_BYTES) -> int:
    """What a rank sends for a token of a layer whose products are summed as floats of item_bytes."""
    return all_reduce_bytes(item_bytes * out_features, size)
