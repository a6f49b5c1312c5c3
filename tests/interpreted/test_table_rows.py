"""Rows of tables of every scheme: the Triton bodies equal the dequantized weight to the bit."""

from __future__ import annotations

import pytest
import torch

from engine.quant.scheme import Scheme
from tests.helpers.tables import TABLES, bound_table, takes


@pytest.mark.parametrize("scheme", TABLES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("columns", [64, 90, 300, 576])
def test_rows_are_those_of_the_weight(scheme: Scheme, columns: int) -> None:
    if not takes(scheme, columns):
        pytest.skip("codes come in pairs")
    torch.manual_seed(0)
    matmul, values = bound_table(scheme, 37, columns)
    for ids in ([36], [0, 5, 36, 5, 16, 15]):
        for dtype, index in ((torch.float32, torch.int32), (torch.float16, torch.int64)):
            rows = matmul.rows(torch.tensor(ids, dtype=index), dtype, 3.3)
            assert torch.equal(rows, values[ids].to(dtype) * 3.3)
