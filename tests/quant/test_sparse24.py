"""Sparse weights have the bits of the same weights stored dense, and what is no such weight is refused."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch

from engine.compression.calibration import CalibrationText
from engine.compression.quantize import quantize_checkpoint
from engine.compression.recipe import Recipe
from engine.errors import ConfigError
from engine.kernels.matmul.cpu_int8 import CpuInt8Matmul
from engine.kernels.matmul.cpu_sharded import ShardedInt8Matmul, block_maxima, num_terms, quantize_part
from engine.kernels.matmul.sparse24 import CENTRE, SparseCodes, compress, first_dense_four
from engine.kernels.operands import SparseInt8Format
from engine.loading.checkpoint import open_checkpoint
from engine.quant.cpu_formats import CPU_ACTIVATIONS, TWO_TERMS
from engine.quant.int4 import Int4
from engine.quant.int8 import Int8
from engine.quant.rounding import round_to_nearest
from engine.quant.scheme import Scheme, Tensors
from engine.quant.sparse24 import Sparse24Int4, Sparse24Int8
from engine.quant.weight import GridWeight
from tests.helpers.paged import CHUNKS, make_runner, make_sequences, run_chunks
from tests.helpers.sparse import prune_checkpoint, prune_fours, sparse_integers
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint

SCHEMES: list[Scheme] = [Sparse24Int8(), Sparse24Int4(32), Sparse24Int4(128)]
SHAPES = [(17, 36), (33, 4), (70, 100), (129, 576)]
BATCHES = (1, 2, 3, 4, 5, 16, 35, 200)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def activations(rows: int, columns: int) -> torch.Tensor:
    """Tokens of all kinds: with elements that need a second term, of zeros, and one that is none."""
    x = torch.randn(rows, columns, generator=generator(1)) * 3
    x[0], x[2, 0], x[3, -1] = 0.7, 1e6, torch.nan
    x[1] = 0.0
    x[5:, ::7] *= 50
    return x


def assert_same_products(sparse: Scheme, tensors: Tensors, dense: Scheme, stored: Tensors) -> None:
    rows, columns = len(tensors["kept"]), 4 * tensors["kept"].shape[1]
    if tensors["kept"].dtype == torch.int8:
        columns //= 2
    bias, x = torch.randn(rows, generator=generator(2)), activations(max(BATCHES), columns)
    ours, theirs = sparse.bind(tensors, bias), dense.bind(stored, bias)
    for size in BATCHES:
        torch.testing.assert_close(ours(x[:size]), theirs(x[:size]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_int8_has_the_bits_of_int8(rows: int, columns: int) -> None:
    weight = prune_fours(torch.randn(rows, columns, generator=generator()))
    tensors, stored = Sparse24Int8().quantize(weight), Int8().quantize(weight)
    assert torch.equal(SparseCodes(tensors["kept"], tensors["masks"]).expand(), stored["weight"])
    assert_same_products(Sparse24Int8(), tensors, Int8(), stored)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_int4_has_the_bits_of_int4_with_the_same_codes(rows: int, columns: int, group_size: int) -> None:
    weight = prune_fours(torch.randn(rows, columns, generator=generator()))
    grid = round_to_nearest(weight, 4, group_size, symmetric=True)
    tensors = Sparse24Int4(group_size).quantize(weight)
    integers = SparseCodes(tensors["kept"], tensors["masks"]).expand()
    assert torch.equal(integers + CENTRE, grid.codes.view(torch.int8))
    assert not integers[weight == 0].any()
    dense = Int4(group_size)
    assert_same_products(Sparse24Int4(group_size), tensors, dense, dense.quantize(grid))


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_largest_sums_of_a_group_fit(group_size: int) -> None:
    weight = prune_fours(torch.full((16, 256), 7.0))
    grid = GridWeight(
        (weight + CENTRE).to(torch.uint8),
        torch.ones(16, 256 // group_size),
        torch.full((16, 256 // group_size), -float(CENTRE)),
        group_size,
    )
    sparse = Sparse24Int4(group_size)
    matmul = sparse.bind(sparse.quantize(grid), None)
    for sign in (1, -1):
        for size in (1, 4, 8):
            torch.testing.assert_close(
                matmul(torch.full((size, 256), 0.01 * sign)),
                torch.full((size, 16), 8.96 * sign),
                rtol=0.01,
                atol=0,
            )


@pytest.mark.parametrize("bits", [8, 4])
def test_all_codes_and_positions(bits: int) -> None:
    """Also the outermost codes, and fours of fewer than two; other rows of a product do not matter."""
    integers = sparse_integers(40, 256, bits, generator())
    integers[0] = prune_fours(torch.ones(1, 256))[0] * (-128 if bits == 8 else -8)
    codes = compress(integers, bits)
    assert torch.equal(codes.expand(), integers)
    assert torch.equal(codes.expand(3, 9), integers[3:9])
    assert sum(part.nbytes for part in (codes.kept, codes.masks)) * 8 == integers.numel() * (bits + 2) // 2
    x = torch.randn(64, 256, generator=generator(1))
    x[:, :8] = torch.tensor([1000.0, -1000, 127, -127, 1, 0, -1, 5])
    if bits == 8:
        grid = GridWeight(integers, torch.ones(40, 1), None, 256)
        sparse: Scheme = Sparse24Int8()
        dense: Scheme = Int8()
    else:
        scale = torch.ones(40, 8).half()
        grid = GridWeight((integers + CENTRE).view(torch.uint8), scale, -CENTRE * scale, 32)
        sparse, dense = Sparse24Int4(32), Int4(32)
    ours = sparse.bind(sparse.quantize(grid), None)
    expected = dense.bind(dense.quantize(grid), None)(x)
    assert torch.equal(ours(x), expected)
    assert torch.equal(torch.cat([ours(x[i : i + 3]) for i in range(0, 64, 3)]), expected)


@pytest.mark.parametrize("format", [CPU_ACTIVATIONS, TWO_TERMS], ids=lambda f: f"spread-{f.spread}")
@pytest.mark.parametrize(("rows", "columns", "size"), [(66, 192, 3), (64, 128, 2)])
def test_sums_of_ranks_have_the_bits_of_one(
    rows: int, columns: int, size: int, format: SparseInt8Format
) -> None:
    integers, scale = sparse_integers(rows, columns, 8, generator()), torch.rand(rows, generator=generator())
    x = torch.randn(20, columns, generator=generator(1)) * 3
    x[:, ::7] *= 50
    parts = [part.contiguous() for part in x.chunk(size, dim=1)]
    products = [
        ShardedInt8Matmul(
            compress(part.contiguous(), 8),
            scale,
            None,
            slice(rank * rows // size, (rank + 1) * rows // size),
            size,
            num_terms(format),
        )
        for rank, part in enumerate(integers.chunk(size, dim=1))
    ]
    for num_tokens in (1, 4, 5, 20):
        maxima = torch.cat([block_maxima(part[:num_tokens]) for part in parts], dim=1)
        codes = [quantize_part(part[:num_tokens], maxima, format) for part in parts]
        sums = [product.sums(part).view(size, -1) for product, part in zip(products, codes, strict=True)]
        y = [
            product.finish(torch.cat([of_rank[rank] for of_rank in sums]), codes[rank])
            for rank, product in enumerate(products)
        ]
        whole = CpuInt8Matmul(integers, scale, None, format)(x[:num_tokens])
        assert torch.equal(torch.cat(y, dim=1), whole)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_storage_is_what_quantize_and_random_return(scheme: Scheme) -> None:
    weight = prune_fours(torch.randn(17, 36, generator=generator()))
    announced = {name: (part.shape, part.dtype) for name, part in scheme.storage(17, 36).items()}
    for tensors in (scheme.quantize(weight), scheme.random(17, 36, torch.device("cpu"))):
        assert {name: (part.shape, part.dtype) for name, part in tensors.items()} == announced
    bits = sum(part.nbytes for part in scheme.storage(64, 1024).values()) * 8 / (64 * 1024)
    assert (
        bits
        == {"sparse24-int8": 5 + 1 / 32, "sparse24-int4g32": 3.5, "sparse24-int4g128": 3.125}[scheme.name]
    )
    x = torch.randn(50, 1024, generator=generator())
    y = scheme.bind(scheme.random(300, 1024, torch.device("cpu")), None)(x)
    assert 0.8 < float(y.std()) < 1.25


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_more_than_two_of_four_are_refused(scheme: Scheme) -> None:
    weight = prune_fours(torch.randn(1100, 64, generator=generator()))
    assert first_dense_four(weight) is None
    weight[1050, 40:43] = 1.0
    assert first_dense_four(weight) == (1050, 40)
    with pytest.raises(
        ConfigError, match=r"^row 1050 has .* in columns 40 to 43, .*prune=2of4 \+ sparse24:int"
    ):
        scheme.quantize(weight)
    with pytest.raises(ConfigError, match="rows of whole fours, and there are some of 63"):
        scheme.storage(10, 63)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sparse24")
    config = deepcopy(TINY_CONFIGS["llama"])
    config.num_hidden_layers = 2
    write_checkpoint(path, config)
    prune_checkpoint(path)
    return path


def test_a_model_has_the_logits_of_int8_and_takes_less(pruned: Path) -> None:
    sparse, dense = (make_runner(pruned, quant=quant) for quant in ("sparse24:int8", "int8"))
    sequences = make_sequences(sparse.model_config.vocab_size)
    for ours, theirs in zip(*(run_chunks(one, sequences, CHUNKS) for one in (sparse, dense)), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(row, theirs[position]) for position, row in ours.items())
    layer, dense_layer = (
        sum(part.nbytes for part in runner.model.layers.state_dict().values()) for runner in (sparse, dense)
    )
    assert layer < 0.7 * dense_layer
    # Another start maps what this one has written.
    again = make_runner(pruned, quant="sparse24:int8")
    assert again.model.num_bytes == sparse.model.num_bytes


@pytest.mark.parametrize("scheme", ["sparse24:int8", "sparse24:int4:g64"])
def test_a_checkpoint_is_written_in_parts_and_read_as_it_was(
    pruned: Path, scheme: str, tmp_path: Path
) -> None:
    source = open_checkpoint(pruned)
    text = CalibrationText(torch.arange(64).view(2, 32), "")
    quantize_checkpoint(source, Recipe.parse(scheme), text, tmp_path / "out", print)
    written = open_checkpoint(tmp_path / "out")
    module = "model.layers.1.mlp.down_proj"
    assert written.config["quantization_config"]["quant_method"] == "llm-engine"
    assert str(written.auto_schemes([module])[module]) == scheme
    ours = Sparse24Int8() if scheme == "sparse24:int8" else Sparse24Int4(64)
    expected = ours.quantize(source.tensor(f"{module}.weight"))
    found = ours.quantize(written.tensor(f"{module}.weight"))
    assert all(torch.equal(found[name], part) for name, part in expected.items())
    assert make_runner(tmp_path / "out").model.num_bytes > 0


def test_a_model_that_is_not_pruned_is_refused_by_module(tmp_path: Path) -> None:
    config = deepcopy(TINY_CONFIGS["llama"])
    config.num_hidden_layers = 1
    write_checkpoint(tmp_path / "model", config)
    expected = r"^model\.layers\.0\.self_attn\.q_proj: row 0 has more than two .*prune=2of4"
    with pytest.raises(ConfigError, match=expected):
        make_runner(tmp_path / "model", quant="sparse24:int8")
