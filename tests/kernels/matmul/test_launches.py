"""Which kernels the float products launch, recorded for chips that are not there."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.launch import TARGETS, Launch, recording
from engine.kernels.matmul.codebook_triton import CodebookMatmul
from engine.kernels.matmul.int4 import Int4Matmul
from engine.kernels.matmul.weight_only import WeightOnlyMatmul
from engine.kernels.operands import GroupSums, SumsFormat

TOKEN_CLASSES = [range(1, 17), range(17, 33), range(33, 65), range(65, 129), range(129, 200)]


def record_int4(arch: str, counts: range, batch_invariant: bool = False) -> set[Launch]:
    codes = torch.empty(4096, 4096, dtype=torch.uint8, device="meta")
    scale = torch.empty(4096, 64, dtype=torch.float16, device="meta")
    with recording(TARGETS[arch]) as launches:
        matmul = Int4Matmul(codes, scale, scale, 128, batch_invariant=batch_invariant)
        assert matmul.format == SumsFormat()
        for count in counts:
            x = torch.empty(count, 8192, dtype=torch.bfloat16, device="meta")
            assert matmul(x).shape == (count, 4096)
            matmul(GroupSums(x, torch.empty(count, 256, device="meta")))
    return launches


@pytest.mark.parametrize("arch", TARGETS)
def test_many_tokens_take_the_large_form_unless_batch_invariant(arch: str) -> None:
    few, many = record_int4(arch, range(1, 2)), record_int4(arch, range(129, 130))
    batch_invariant = record_int4(arch, range(129, 130), batch_invariant=True)
    assert {launch.name for launch in few} == {"_group_sums_kernel", "_int4_segments_kernel"}
    assert {launch.name for launch in many} == {"_int4_large_kernel"}
    assert {launch.name for launch in batch_invariant} == {"_group_sums_kernel", "_int4_segments_kernel"}


@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
@pytest.mark.parametrize("counts", TOKEN_CLASSES)
def test_tokens_do_not_decide_what_is_compiled(arch: str, counts: range) -> None:
    assert record_int4(arch, counts) == record_int4(arch, counts[-1:])
    assert record_int4(arch, counts, batch_invariant=True) == record_int4(
        arch, counts[-1:], batch_invariant=True
    )


@pytest.mark.parametrize("counts", TOKEN_CLASSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_tokens_do_not_decide_what_is_compiled_weight_only(dtype: torch.dtype, counts: range) -> None:
    weight = torch.empty(4096, 8192, dtype=dtype, device="meta")
    scale = torch.empty(4096, device="meta") if dtype == torch.int8 else None
    recorded = []
    for some in (counts, counts[-1:]):
        with recording(TARGETS["sm_90"]) as launches:
            matmul = WeightOnlyMatmul(weight, scale)
            for count in some:
                matmul(torch.empty(count, 8192, dtype=torch.bfloat16, device="meta"))
        recorded.append(launches)
    assert recorded[0] == recorded[1]


@pytest.mark.parametrize("counts", TOKEN_CLASSES)
@pytest.mark.parametrize("is_scaled", [False, True])
def test_tokens_do_not_decide_what_is_compiled_codebooks(is_scaled: bool, counts: range) -> None:
    codes = torch.empty(4096, 4096, dtype=torch.uint8, device="meta")
    codebook = torch.empty(1 if is_scaled else 4096, 16, device="meta")
    recorded = []
    for some in (counts, counts[-1:]):
        with recording(TARGETS["sm_90"]) as launches:
            scale = torch.empty(4096, 128, device="meta") if is_scaled else None
            matmul = CodebookMatmul(codes, codebook, scale)
            for count in some:
                matmul(torch.empty(count, 8192, dtype=torch.bfloat16, device="meta"))
        recorded.append(launches)
    assert recorded[0] == recorded[1]
