"""bitsandbytes directories, against bytes written down, decoding element by element, and the library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.quant.weight import CodebookWeight, GridWeight, to_float
from tests.helpers.quantized_directory import MODULE, assert_refused, read_module, write_directory

EIGHT_BITS = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
FOUR_BITS = {
    "quant_method": "bitsandbytes",
    "load_in_8bit": False,
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}
NF4_STATE = "weight.quant_state.bitsandbytes__nf4"

# A map like NF4's, with values that are exact in binary.
VALUES = [
    -1,
    -0.75,
    -0.5,
    -0.375,
    -0.25,
    -0.1875,
    -0.125,
    0,
    0.0625,
    0.125,
    0.25,
    0.3125,
    0.4375,
    0.5,
    0.75,
    1,
]


def state_tensor(state: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def store(shape: tuple[int, int], block_size: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A module of random codes, not nested."""
    generator = torch.Generator().manual_seed(seed)
    elements = shape[0] * shape[1]
    state = {"quant_type": "nf4", "blocksize": block_size, "dtype": "bfloat16", "shape": shape}
    return {
        "weight": torch.randint(0, 256, ((elements + 1) // 2, 1), generator=generator, dtype=torch.uint8),
        "weight.absmax": torch.rand(-(-elements // block_size), generator=generator) + 0.01,
        "weight.quant_map": torch.tensor(VALUES),
        NF4_STATE: state_tensor(state),
    }


def nest(parts: dict[str, torch.Tensor], nested_block_size: int, offset: float) -> dict[str, torch.Tensor]:
    """The same module with random bytes for its scales."""
    generator = torch.Generator().manual_seed(5)
    blocks = parts["weight.absmax"].numel()
    state = json.loads(bytes(parts[NF4_STATE].tolist()))
    state |= {"nested_blocksize": nested_block_size, "nested_offset": offset, "nested_dtype": "float32"}
    return {
        **parts,
        "weight.absmax": torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8),
        "weight.nested_absmax": torch.rand(-(-blocks // nested_block_size), generator=generator),
        "weight.nested_quant_map": torch.rand(256, generator=generator) * 2 - 1,
        NF4_STATE: state_tensor(state),
    }


def decode(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the parts say, element by element in Python's floats, [N, K] float64."""
    state = json.loads(bytes(parts[NF4_STATE].tolist()))
    rows, columns = state["shape"]
    packed, values = parts["weight"].flatten().tolist(), parts["weight.quant_map"].tolist()
    absmax = parts["weight.absmax"].tolist()
    if "nested_offset" in state:
        scales, nested_values = (
            parts["weight.nested_absmax"].tolist(),
            parts["weight.nested_quant_map"].tolist(),
        )
        absmax = [
            nested_values[byte] * scales[block // state["nested_blocksize"]] + state["nested_offset"]
            for block, byte in enumerate(absmax)
        ]
    weight = []
    for element in range(rows * columns):
        byte = packed[element // 2]
        code = byte // 16 if element % 2 == 0 else byte % 16
        weight.append(values[code] * absmax[element // state["blocksize"]])
    return torch.tensor(weight, dtype=torch.float64).view(rows, columns)


def test_bytes_written_down(tmp_path: Path) -> None:
    """Three rows of two, in blocks of four: the second block is short."""
    parts = {
        "weight": torch.tensor([[0x0F], [0x78], [0xE1]], dtype=torch.uint8),
        "weight.absmax": torch.tensor([2.0, 4.0]),
        "weight.quant_map": torch.tensor(VALUES),
        NF4_STATE: state_tensor({"quant_type": "nf4", "blocksize": 4, "dtype": "float16", "shape": [3, 2]}),
    }
    weight = read_module(tmp_path, parts, FOUR_BITS)
    assert isinstance(weight, torch.Tensor)
    assert weight.dtype == torch.float32
    assert weight.tolist() == [[-2.0, 2.0], [0.0, 0.125], [3.0, -3.0]]


def test_nested_bytes_written_down(tmp_path: Path) -> None:
    """Absmax of 0.5 * 4 + 1 = 3 and -0.25 * 8 + 1 = -1, each of a nested block of its own."""
    nested_values = torch.zeros(256)
    nested_values[7], nested_values[200] = 0.5, -0.25
    state = {"blocksize": 2, "shape": [2, 2], "nested_blocksize": 1, "nested_offset": 1.0}
    parts = {
        "weight": torch.tensor([[0x0F], [0xF2]], dtype=torch.uint8),
        "weight.absmax": torch.tensor([7, 200], dtype=torch.uint8),
        "weight.quant_map": torch.tensor(VALUES),
        "weight.nested_absmax": torch.tensor([4.0, 8.0]),
        "weight.nested_quant_map": nested_values,
        NF4_STATE: state_tensor(state),
    }
    weight = read_module(tmp_path, parts, FOUR_BITS)
    assert isinstance(weight, CodebookWeight)
    assert weight.codes.tolist() == [[0, 15], [15, 2]]
    assert weight.scale is not None
    assert weight.scale.tolist() == [[3.0], [-1.0]]
    assert weight.group_size == 2
    assert weight.dequantize().tolist() == [[-3.0, 3.0], [-1.0, 0.5]]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [((8, 64), 64), ((4, 384), 128), ((6, 50), 64), ((3, 7), 64), ((5, 13), 16), ((64, 96), 64)],
)
def test_four_bits_are_codes_or_floats(
    tmp_path: Path, shape: tuple[int, int], block_size: int, nested: bool
) -> None:
    parts = store(shape, block_size)
    if nested:
        parts = nest(parts, 4, 0.75)
    weight = read_module(tmp_path, parts, FOUR_BITS)
    assert isinstance(weight, CodebookWeight) == (shape[1] % block_size == 0)
    values = to_float(weight)
    assert values.dtype == torch.float32
    # Three roundings of numbers below 2: nested product, sum and final product.
    assert torch.all((values.double() - decode(parts)).abs() <= 3 * 2**-23)


def test_codes_may_be_stored_as_floats(tmp_path: Path) -> None:
    """`bnb_4bit_quant_storage`: the same bytes under another type."""
    parts = store((8, 64), 64)
    expected = decode(parts)
    parts["weight"] = parts["weight"].view(-1, 4).view(torch.float32)
    weight = read_module(tmp_path, parts, FOUR_BITS)
    assert torch.all((to_float(weight).double() - expected).abs() <= 2**-23)


def test_eight_bits_are_a_grid(tmp_path: Path) -> None:
    codes = torch.tensor([[127, -127, 0], [64, -1, 2], [-128, 5, 127]], dtype=torch.int8)
    row_maximum = torch.tensor([127.0, 254.0, 63.5])
    parts = {"weight": codes, "SCB": row_maximum, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    for stored in (parts, {part: tensor for part, tensor in parts.items() if part != "weight_format"}):
        weight = read_module(tmp_path, stored, EIGHT_BITS)
        assert isinstance(weight, GridWeight)
        assert torch.equal(weight.codes, codes)
        assert weight.minimum is None
        assert weight.group_size == 3
        assert weight.dequantize().tolist() == [[127.0, -127.0, 0.0], [128.0, -2.0, 4.0], [-64.0, 2.5, 63.5]]


def test_names_and_floats(tmp_path: Path) -> None:
    tensors = {f"{MODULE}.{part}": tensor for part, tensor in nest(store((8, 64), 64), 4, 0.5).items()}
    tensors["model.layers.0.self_attn.o_proj.weight"] = torch.ones(4, 4, dtype=torch.int8)
    tensors["model.layers.0.self_attn.o_proj.SCB"] = torch.ones(4)
    norm = torch.rand(8).bfloat16()
    # Old configurations name no method.
    checkpoint = write_directory(tmp_path, {**tensors, "model.norm.weight": norm}, {"load_in_4bit": True})
    names = {f"{MODULE}.weight", "model.layers.0.self_attn.o_proj.weight", "model.norm.weight"}
    assert checkpoint.names() == names
    stored = checkpoint.tensor("model.norm.weight")
    assert isinstance(stored, torch.Tensor)
    assert torch.equal(stored, norm)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (48, 60)])
def test_four_bits_as_the_library_stores_and_reads_them(
    tmp_path: Path, shape: tuple[int, int], nested: bool, kind: str
) -> None:
    library = pytest.importorskip("bitsandbytes")
    layer = library.nn.Linear4bit(
        shape[1],
        shape[0],
        bias=False,
        compute_dtype=torch.float32,
        compress_statistics=nested,
        quant_type=kind,
    )
    layer.weight = library.nn.Params4bit(
        torch.randn(shape), requires_grad=False, compress_statistics=nested, quant_type=kind
    )
    layer = layer.to("cpu")
    assert layer.weight.dtype == torch.uint8
    parts = {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}
    assert f"weight.quant_state.bitsandbytes__{kind}" in parts
    assert ("weight.nested_absmax" in parts) == nested
    weight = to_float(read_module(tmp_path, parts, FOUR_BITS))
    expected = library.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    # The library may multiply in another order; weights are below 8.
    assert torch.all((weight - expected).abs() <= 8 * 3 * 2**-24)


def test_eight_bits_as_the_library_stores_and_reads_them(tmp_path: Path) -> None:
    library = pytest.importorskip("bitsandbytes")
    codes, row_maximum, _ = library.functional.int8_vectorwise_quant(torch.randn(48, 64).half())
    weight = read_module(tmp_path, {"weight": codes, "SCB": row_maximum}, EIGHT_BITS)
    assert isinstance(weight, GridWeight)
    expected = library.functional.int8_vectorwise_dequant(codes, row_maximum)
    # The library multiplies by 1 / 127 as float32: three roundings each way, of weights below 8.
    assert torch.all((weight.dequantize() - expected).abs() <= 8 * 3 * 2**-24)


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("weight", None, ["missing"]),
        ("weight.absmax", None, ["missing"]),
        ("weight.quant_map", None, ["missing"]),
        ("weight.nested_absmax", None, ["missing"]),
        ("weight.nested_quant_map", None, ["missing"]),
        (NF4_STATE, None, ["missing"]),
        ("weight", lambda tensor: tensor[1:], ["256 bytes", "[8, 64]", "255 bytes"]),
        ("weight.absmax", lambda tensor: tensor[1:], ["[8]", "[7]"]),
        ("weight.absmax", lambda tensor: tensor.half(), ["float32", "float16"]),
        ("weight.quant_map", lambda tensor: tensor[1:], ["[16]", "[15]"]),
        ("weight.nested_absmax", lambda tensor: tensor[1:], ["[2]", "[1]"]),
        ("weight.nested_quant_map", lambda tensor: tensor[1:], ["[256]", "[255]"]),
        (NF4_STATE, lambda tensor: tensor[1:], ["JSON"]),
        (NF4_STATE, lambda _: state_tensor([]), ["object", "[]"]),
    ],
)
def test_damaged_tensors_are_named(tmp_path: Path, part: str, change: Any, words: list[str]) -> None:
    parts = nest(store((8, 64), 64), 4, 0.5)
    if change is None:
        del parts[part]
    else:
        parts[part] = change(parts[part])
    assert_refused(lambda: read_module(tmp_path, parts, FOUR_BITS), f"{MODULE}.{part}", str(tmp_path), *words)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("shape", None, ["shape", "None"]),
        ("shape", [512], ["shape", "[512]"]),
        ("shape", [8, 64.0], ["shape", "64.0"]),
        ("blocksize", 0, ["blocksize", "0"]),
        ("blocksize", None, ["blocksize", "None"]),
        ("nested_blocksize", -4, ["nested_blocksize", "-4"]),
        ("nested_blocksize", None, ["nested_blocksize"]),
        ("nested_offset", "0.5", ["nested_offset", "'0.5'"]),
        ("nested_offset", None, ["nested"]),
    ],
)
def test_damaged_states_are_named(tmp_path: Path, key: str, value: object, words: list[str]) -> None:
    parts = nest(store((8, 64), 64), 4, 0.5)
    state = json.loads(bytes(parts[NF4_STATE].tolist()))
    parts[NF4_STATE] = state_tensor({**state, key: value})
    assert_refused(lambda: read_module(tmp_path, parts, FOUR_BITS), MODULE, str(tmp_path), *words)


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("weight", None, ["missing"]),
        ("SCB", None, ["missing"]),
        ("weight", lambda tensor: tensor.short(), ["int8", "int16"]),
        ("SCB", lambda tensor: tensor[1:], ["[4]", "[3]"]),
        ("weight_format", lambda tensor: tensor + 2, ["0 (rows)", "2"]),
    ],
)
def test_damaged_eight_bits_are_named(tmp_path: Path, part: str, change: Any, words: list[str]) -> None:
    parts = {
        "weight": torch.ones(4, 8, dtype=torch.int8),
        "SCB": torch.ones(4),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    if change is None:
        del parts[part]
    else:
        parts[part] = change(parts[part])
    assert_refused(
        lambda: read_module(tmp_path, parts, EIGHT_BITS), f"{MODULE}.{part}", str(tmp_path), *words
    )


def test_integers_without_their_scales_are_refused(tmp_path: Path) -> None:
    parts = {"weight": torch.ones(4, 8, dtype=torch.int8)}
    assert_refused(lambda: read_module(tmp_path, parts, EIGHT_BITS), f"{MODULE}.weight", "float32", "int8")
