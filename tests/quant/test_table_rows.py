"""A table's rows are those of the weight that is multiplied with, to the bit, and it is stored once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.executor.runner import ModelRunner
from engine.kernels import cpu
from engine.loading.checkpoint import open_checkpoint
from engine.quant.plan import QuantizationPlan
from engine.quant.scheme import Scheme
from engine.quant_spec import parse_quant_spec
from tests.helpers.tables import TABLES, bound_table, takes
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint

TIED = "smollm2"


@pytest.mark.parametrize("body", ["C", "torch"])
@pytest.mark.parametrize("scheme", TABLES, ids=lambda scheme: scheme.name)
def test_rows_are_those_of_the_weight(scheme: Scheme, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if body == "torch":
        monkeypatch.setattr(cpu, "library", lambda: None)
    elif cpu.library() is None:
        pytest.skip("there is no C compiler")
    torch.manual_seed(0)
    for columns in (64, 33, 90, 300, 576):
        if not takes(scheme, columns):
            continue
        matmul, values = bound_table(scheme, 37, columns)
        for ids in ([36], [0, 5, 36, 5, 16, 15], list(range(37)) * 3):
            for dtype, index in ((torch.float32, torch.int32), (torch.bfloat16, torch.int64)):
                expected = values[ids].to(dtype) * 3.3
                assert torch.equal(matmul.rows(torch.tensor(ids, dtype=index), dtype, 3.3), expected)


@pytest.mark.parametrize("quant", ["none", "int8:g32", "int4", "nf4"])
def test_a_tied_table_is_stored_once(quant: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY_CONFIGS[TIED])
    config = EngineConfig(
        model=str(tmp_path), quant=quant, kv_cache_memory="1MiB", cache_dir=str(tmp_path / "cache")
    )
    runner = ModelRunner(config, open_checkpoint(tmp_path))
    vocab_size, width = runner.model_config.vocab_size, runner.model_config.hidden_size
    row_bytes = 4 * width if quant == "none" else -(-width // 64) * 64
    # Nothing but a table has so many rows, or panels of 16 of them.
    tables = [x for x in runner.model.state_dict().values() if len(x) in (vocab_size, vocab_size // 16)]
    assert [x.nbytes for x in tables if x.nbytes >= vocab_size * width] == [vocab_size * row_bytes]


@pytest.mark.parametrize(
    ("quant", "table"),
    [
        ("none", "float32"),
        # A scale a row is coarse for what is looked up.
        ("int8", "int8-g32"),
        ("int8:g64", "int8-g32"),
        ("int4", "int8-g32"),
        ("q4_0", "q4_0"),
        # What is named stays as it is named.
        ("q4_0,model.embed_tokens=int8", "int8-g32"),
        ("q4_0,model.embed_tokens=q6_k", "q6_k"),
        ("int8,model.embed_tokens=none", "float32"),
    ],
)
def test_the_scheme_of_a_table(quant: str, table: str) -> None:
    assert QuantizationPlan(parse_quant_spec(quant), torch.float32).table.name == table
