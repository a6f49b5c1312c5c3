"""Row-parallel layers by themselves, over gloo: which form they take, its bits, and the bytes that it sends."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal, get_args

import pytest
import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from engine.errors import ConfigError
from engine.kernels import cpu
from engine.loading.slices import take_slices
from engine.models.config import ModelConfig
from engine.models.linear import Linear
from engine.models.sharding import check_columns
from engine.models.splits import RowParallelGather, RowParallelIntegerSum, RowParallelSum, Split, row_parallel
from engine.parallel.costs import (
    all_reduce_bytes,
    float_sum_bytes,
    gather_bytes,
    gathered_bytes,
    integer_sum_bytes,
)
from engine.parallel.exchanges import step_bytes
from engine.parallel.group import TensorGroup
from engine.parallel.place import take_place
from engine.parallel.shards import Shard, Slices
from engine.quant.codebook4 import Codebook4
from engine.quant.floating import Float
from engine.quant.int4 import Int4
from engine.quant.int8 import Int8
from engine.quant.int8_groups import Int8Groups
from engine.quant.int8_weight_only import Int8WeightOnly
from engine.quant.nf4 import NF4
from engine.quant.rotated import Rotated
from engine.quant.scheme import Scheme
from engine.quant.weight import GridWeight, Weight, to_float
from engine.quant_spec import ActivationTerms, parse_quant_spec
from tests.helpers.forked_ranks import CONTEXT, start_server

SIZES = (2, 3)

TOKENS = (1, 5, 40)

Source = Literal["floats", "blocks of 32", "four bits", "rows"]


@dataclass(frozen=True)
class Case:
    """A layer, and the form that it must take."""

    in_features: int
    out_features: int
    scheme: Scheme
    form: type[Split]
    source: Source = "floats"
    has_bias: bool = False


def cases(size: int) -> list[Case]:
    wide, narrow = 64 * size, 16 * size  # inputs and outputs
    return [
        Case(wide, narrow, Int8(), RowParallelIntegerSum),
        Case(wide, narrow, Int8(), RowParallelIntegerSum, "blocks of 32", has_bias=True),
        Case(wide, narrow, Int8("two-terms"), RowParallelIntegerSum, "four bits"),
        Case(96 * size, 22 * size, Int8("token"), RowParallelIntegerSum, "rows", has_bias=True),
        # More outputs to sum than inputs to gather.
        Case(wide, 2 * wide, Int8(), RowParallelGather, has_bias=True),
        # No whole blocks, and one alone.
        Case(80 * size, narrow, Int8(), RowParallelGather, "rows"),
        Case(32 * size, 8 * size, Int8(), RowParallelGather, "blocks of 32"),
        # Sums of groups are not integers of one scale.
        Case(wide, narrow, Int8("groups"), RowParallelGather),
        Case(wide, narrow, Int8Groups(32), RowParallelGather, "blocks of 32"),
        # Blocks of a rotation may straddle what ranks bring.
        Case(wide, narrow, Rotated(Int4(32)), RowParallelGather, has_bias=True),
    ]


def weight_of(case: Case) -> Weight:
    shape = case.out_features, case.in_features
    blocks = case.out_features, -(-case.in_features // 32)
    match case.source:
        case "floats":
            return torch.randn(shape) * torch.rand(shape[0], 1)
        case "rows":
            codes = torch.randint(-127, 128, shape, dtype=torch.int8)
            return GridWeight(codes, torch.rand(shape[0], 1), None, shape[1])
        case "blocks of 32":
            return GridWeight(
                torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(blocks).half(), None, 32
            )
    return GridWeight(
        torch.randint(0, 16, shape, dtype=torch.uint8),
        torch.rand(blocks).half(),
        torch.randn(blocks).half(),
        32,
    )


def inputs_of(case: Case) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(max(TOKENS), case.in_features)
    x[0, 0], x[1], x[2, -1], x[3, 5], x[4] = 100.0, 0.0, torch.nan, -torch.inf, x[4] * 1e-30
    return x


def source_of(case: Case) -> tuple[Weight, torch.Tensor]:
    """Weight and bias, the same on all ranks."""
    torch.manual_seed(case.in_features + case.out_features)
    return weight_of(case), torch.randn(case.out_features)


def build(case: Case, group: TensorGroup) -> Linear:
    weight, bias = source_of(case)

    def read(name: str, part: Slices) -> Weight:
        return take_slices(weight if name.endswith("weight") else bias, part, name)

    split = row_parallel(group, case.in_features, case.out_features, case.scheme)
    linear = Linear(["down"], case.in_features, [case.out_features], [case.scheme], case.has_bias, split)
    linear.load(read)
    linear.bind()
    return linear


def summed_cases(size: int) -> list[Case]:
    """Every scheme."""
    schemes: list[Scheme] = [
        Float(torch.float32),
        *(Int8(terms) for terms in get_args(ActivationTerms)),
        Int8Groups(32),
        Int8WeightOnly(),
        Int8WeightOnly(32),
        Int4(32),
        Int4(0),
        Rotated(Int4(32)),
        NF4(),
        Codebook4(),
    ]
    return [Case(128 * size, 48, scheme, RowParallelSum, has_bias=True) for scheme in schemes]


@dataclass(frozen=True)
class Result:
    """What a rank has of a case: its form, the outputs by number of tokens, and the bytes brought to exchanges.

    Attributes:
        planned: By kind of exchange, the bytes a token that its split says it brings.
    """

    form: str
    planned: dict[str, int]
    outputs: list[torch.Tensor]
    brought: list[dict[str, int]]


def run_rank(rank: int, size: int, directory: str) -> None:
    results = []
    for rank_invariant in (True, False):
        store = FileStore(f"{directory}/{size}-{rank_invariant}", size)
        group = take_place(store, rank, size, 1, torch.device("cpu"), rank_invariant).group
        for case in cases(size) if rank_invariant else summed_cases(size):
            linear, x = build(case, group), inputs_of(case)
            columns = group.shard.of(case.in_features)
            outputs, brought = [], []
            for num_tokens in TOKENS:
                before = dict(group.num_bytes)
                outputs.append(linear(x[:num_tokens, columns].contiguous()))
                brought.append({kind: count - before[kind] for kind, count in group.num_bytes.items()})
            planned = step_bytes(linear.split.exchanges("layer", x.itemsize), num_tokens=1, num_draws=0)
            results.append((type(linear.split).__name__, planned, outputs, brought))
    torch.save(results, f"{directory}/{rank}-of-{size}")


def run_ranks(rank: int, directory: str) -> None:
    """A process is a rank of two, if it is one of the first, and then of three."""
    for size in SIZES:
        if rank < size:
            run_rank(rank, size, directory)


Results = dict[int, list[list[Result]]]
"""By number of ranks, each rank's, of the exact cases and then the summed ones."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    if cpu.library() is None:
        pytest.skip("there is no C compiler on this machine")
    directory = tmp_path_factory.mktemp("ranks")
    start_server()
    processes = [
        CONTEXT.Process(target=run_ranks, args=(rank, str(directory)), daemon=True)
        for rank in range(max(SIZES))
    ]
    for process in processes:
        process.start()
    while not any(process.exitcode for process in processes) and None in [
        process.exitcode for process in processes
    ]:
        time.sleep(0.05)
    for process in processes:
        process.kill()  # who waits for one that failed
        process.join()
    assert [process.exitcode for process in processes] == [0] * max(SIZES)
    return {
        size: [
            [Result(*result) for result in torch.load(directory / f"{rank}-of-{size}")]
            for rank in range(size)
        ]
        for size in SIZES
    }


@pytest.mark.process
@pytest.mark.parametrize("size", SIZES)
def test_layers_have_the_bits_of_one_rank_and_send_what_they_cost(size: int, results: Results) -> None:
    for index, case in enumerate(cases(size)):
        alone, x = build(case, TensorGroup()), inputs_of(case)
        for rank in results[size]:
            result = rank[index]
            assert result.form == case.form.__name__, case
            for num_tokens, y, brought in zip(TOKENS, result.outputs, result.brought, strict=True):
                expected = alone(x[:num_tokens])
                assert expected.isnan().any(dim=1).sum() == (0 if num_tokens == 1 else 2)
                torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
                assert brought == {kind: num_tokens * result.planned.get(kind, 0) for kind in brought}
                shape = case.in_features, case.out_features, size
                terms = 1 if isinstance(case.scheme, Int8) and case.scheme.activations == "token" else 2
                is_summed = case.form is RowParallelIntegerSum
                planned = integer_sum_bytes(*shape, terms) if is_summed else gathered_bytes(*shape)
                # To each of the others what it has for all, and what it has for that one of what is summed.
                sent = (size - 1) * brought["gather"] + (size - 1) * brought["sum"] // size
                assert sent == num_tokens * planned


@pytest.mark.process
@pytest.mark.parametrize("size", SIZES)
def test_summed_floats_are_as_near_as_those_of_one_rank(size: int, results: Results) -> None:
    # Their bits are others: each rank rounds its part, and the floats are added in another order.
    for case, *ranks in zip(
        summed_cases(size), *(rank[len(cases(size)) :] for rank in results[size]), strict=True
    ):
        alone, x = build(case, TensorGroup()), inputs_of(case)
        weight, bias = source_of(case)
        exact = x.double() @ to_float(weight).double().t() + bias
        rows = torch.arange(5, max(TOKENS))
        for rank in ranks:
            assert rank.form == "RowParallelSum"
            assert rank.brought[-1] == {
                kind: max(TOKENS) * rank.planned.get(kind, 0) for kind in ("gather", "sum")
            }
            y = rank.outputs[-1]
            torch.testing.assert_close(y, ranks[0].outputs[-1], rtol=0, atol=0, equal_nan=True)
            error, error_alone = ((z - exact)[rows].norm().item() for z in (y.double(), alone(x).double()))
            # Scales of parts are at most those of the whole; codebooks of parts are found anew.
            assert error <= 1.2 * error_alone + 1e-6 * exact[rows].norm().item(), case
            # Each gets the sum of all it brings: twice what it would have for the others.
            sent = 2 * (size - 1) * rank.brought[-1]["sum"] // size + rank.brought[-1]["gather"]
            assert sent == max(TOKENS) * float_sum_bytes(case.out_features, size)


def small_model(**changes: int) -> ModelConfig:
    sizes = {"num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 32, "intermediate_size": 1536}
    words = {"model_type": "llama", "vocab_size": 64, "hidden_size": 384, "num_hidden_layers": 2}
    return ModelConfig.from_dict(
        {**words, **sizes, "rms_norm_eps": 1e-5, "max_position_embeddings": 64, **changes}
    )


def test_columns_cut_through_groups_are_refused_with_the_numbers() -> None:
    model = small_model()
    for text, size in (
        ("int8", 12),
        ("int4:g128", 3),
        ("nf4", 6),
        ("int4:g0,*.o_proj=int8:g32", 12),
        ("nf4", 1),
    ):
        check_columns(model, parse_quant_spec(text), size)
    with pytest.raises(
        ConfigError, match=r"2 ranks cut the 384 .*o_proj within groups of 128.*-size of 1 or 3$"
    ):
        check_columns(model, parse_quant_spec("int4:g128"), 2)
    with pytest.raises(ConfigError, match=r"4 ranks cut the 384 .* of 64.*-size of 1 or 2 or 3 or 6$"):
        check_columns(model, parse_quant_spec("nf4"), 4)
    check_columns(model, parse_quant_spec("int4:rotated"), 3)
    with pytest.raises(
        ConfigError, match=r"2 ranks cut the 384 .* groups of 128, which are rotated together; .* of 1 or 3$"
    ):
        check_columns(model, parse_quant_spec("int4:rotated"), 2)
    rules = parse_quant_spec("none,model.layers.1.mlp.down_proj=int4:g128")
    with pytest.raises(ConfigError, match=r"4 ranks cut the 1600 .*down_proj within groups of 128"):
        check_columns(small_model(intermediate_size=1600), rules, 4)


def test_without_kernels_for_sums_inputs_are_gathered() -> None:
    for has_kernels, form in ((True, RowParallelIntegerSum), (False, RowParallelGather)):
        group = TensorGroup(Shard(0, 2), has_integer_sums=has_kernels)
        assert isinstance(row_parallel(group, 256, 64, Int8()), form)
    assert isinstance(
        row_parallel(TensorGroup(Shard(0, 2), None, False, True), 256, 64, Int8()), RowParallelSum
    )
    assert isinstance(row_parallel(TensorGroup(), 256, 64, Int8()), RowParallelSum)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_bytes_are_those_of_the_exchanges_written_out(size: int) -> None:
    # A ring: in each of 2 (n - 1) rounds a rank passes an n-th on; n - 1 of them spread what ranks have.
    whole = 4 * 24 * size
    part = whole // size
    assert gather_bytes(whole, size) == sum(part for _ in range(size - 1))
    assert all_reduce_bytes(whole, size) == sum(part for _ in range(2 * (size - 1)))
    assert float_sum_bytes(24 * size, size) == all_reduce_bytes(whole, size)
    # Where the exact forms cost the same: K = 2.06 N, or 1.03 N with one term.
    for terms, ratio in ((2, 2.0645), (1, 1.0323)):
        out_features = 9600 * size
        for margin, is_less in ((0.99, False), (1.01, True)):
            in_features = int(out_features * ratio * margin) // (32 * size) * (32 * size)
            sums = integer_sum_bytes(in_features, out_features, size, terms)
            assert (sums < gathered_bytes(in_features, out_features, size)) == is_less
