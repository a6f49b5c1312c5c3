"""compressed-tensors directories, against words written down, packing element by element, and the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.quant.weight import GridWeight, Weight, to_float
from tests.helpers.quantized_directory import (
    MODULE,
    assert_refused,
    expected_weight,
    pack_rows,
    random_codes,
    random_scales,
    read_module,
    to_tensor,
    transpose,
    write_directory,
)

# Neither fills its last word.
ROWS, COLUMNS = 21, 60


def scheme(
    bits: int = 4, strategy: str = "group", symmetric: bool = True, group_size: int = 20, **changes: Any
) -> dict[str, Any]:
    """A group of config_groups that targets every linear layer."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group_size if strategy == "group" else None,
        "actorder": None,
        "dynamic": False,
        **changes,
    }
    return {"targets": ["Linear"], "weights": weights, "input_activations": None}


def settings(layout: str, *groups: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        **changes,
    }


def store_packed(
    codes: list[list[int]], zeros: list[list[int]] | None, scales: torch.Tensor, bits: int
) -> dict[str, torch.Tensor]:
    """Unsigned codes [N][K] and zeros [N][G], and scales [N, G], as "pack-quantized"."""
    parts = {
        "weight_packed": to_tensor(pack_rows(codes, bits)),
        "weight_shape": torch.tensor([len(codes), len(codes[0])]),
        "weight_scale": scales,
    }
    if zeros is not None:
        parts["weight_zero_point"] = to_tensor(transpose(pack_rows(transpose(zeros), bits)))
    return parts


def signed(codes: list[list[int]], bits: int) -> torch.Tensor:
    return torch.tensor([[code - (1 << (bits - 1)) for code in row] for row in codes], dtype=torch.int8)


def test_words_written_down(tmp_path: Path) -> None:
    """A nibble of 8 is zero. Groups of four; row 1 has the zeros -8 and 7, stored as 0 and 15."""
    parts = {
        "weight_packed": to_tensor([[0x76543210], [0xFEDCBA98]]),
        "weight_shape": torch.tensor([2, 8]),
        "weight_scale": torch.tensor([[1.0, 2.0], [0.5, 1.0]]).half(),
        "weight_zero_point": to_tensor([[0x08, 0xF8]]),
    }
    weight = read_module(tmp_path, parts, settings("pack-quantized", scheme(symmetric=False, group_size=4)))
    assert isinstance(weight, GridWeight)
    assert weight.codes.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]]
    assert weight.dequantize().tolist() == [
        [-8.0, -7.0, -6.0, -5.0, -8.0, -6.0, -4.0, -2.0],
        [4.0, 4.5, 5.0, 5.5, -3.0, -2.0, -1.0, 0.0],
    ]


def test_words_of_eight_bits_written_down(tmp_path: Path) -> None:
    parts = {
        "weight_packed": to_tensor([[0xFF818000, 0x00000001]]),
        "weight_shape": torch.tensor([1, 5]),
        "weight_scale": torch.tensor([[0.5]]).half(),
    }
    weight = read_module(tmp_path, parts, settings("pack-quantized", scheme(8, "channel")))
    assert isinstance(weight, GridWeight)
    assert weight.codes.tolist() == [[-128, 0, 1, 127, -127]]
    assert weight.minimum is None
    assert weight.dequantize().tolist() == [[-64.0, 0.0, 0.5, 63.5, -63.5]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel"])
@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized", "naive-quantized"])
@pytest.mark.parametrize("bits", [4, 8])
def test_layouts_agree(
    tmp_path: Path, bits: int, layout: str, strategy: str, symmetric: bool, dtype: torch.dtype
) -> None:
    size = 20 if strategy == "group" else COLUMNS
    codes = random_codes(ROWS, COLUMNS, bits, seed=1)
    zeros = None if symmetric else random_codes(ROWS, COLUMNS // size, bits, seed=2)
    scales = random_scales(ROWS, COLUMNS // size, dtype)
    parts = store_packed(codes, zeros, scales, bits)
    if layout != "pack-quantized":
        parts = {"weight": signed(codes, bits), "weight_scale": scales}
        if zeros is not None:
            parts["weight_zero_point"] = signed(zeros, bits)
    weight = read_module(tmp_path, parts, settings(layout, scheme(bits, strategy, symmetric)))
    zeros = zeros or [[1 << (bits - 1)] * (COLUMNS // size)] * ROWS
    if bits == 4:
        assert isinstance(weight, GridWeight)
        assert weight.codes.tolist() == codes
        assert weight.minimum is not None
        assert weight.minimum.dtype == torch.float32
    elif symmetric:
        assert isinstance(weight, GridWeight)
        assert torch.equal(weight.codes, signed(codes, 8))
        assert weight.minimum is None
    else:
        assert isinstance(weight, torch.Tensor)
    if isinstance(weight, GridWeight):
        assert weight.group_size == size
        assert weight.scale.dtype == (torch.float16 if dtype == torch.float16 else torch.float32)
    # Scales of at most 11 bits times codes of at most 9: float32 holds every product and sum.
    expected = expected_weight(codes, zeros, scales, lambda k: k // size)
    assert torch.equal(to_float(weight).double(), expected)


def test_one_scale_for_the_whole_tensor(tmp_path: Path) -> None:
    codes = random_codes(ROWS, COLUMNS, 8, seed=1)
    parts = {"weight": signed(codes, 8), "weight_scale": torch.tensor([0.03]).half()}
    weight = read_module(tmp_path, parts, settings("int-quantized", scheme(8, "tensor")))
    assert isinstance(weight, GridWeight)
    expected = expected_weight(codes, [[128]] * ROWS, parts["weight_scale"].expand(ROWS, 1), lambda _: 0)
    assert torch.equal(weight.dequantize().double(), expected)


def test_zeros_that_are_not_packed(tmp_path: Path) -> None:
    """Early releases packed the codes only."""
    codes, zeros = random_codes(ROWS, COLUMNS, 4, seed=1), random_codes(ROWS, 3, 4, seed=2)
    scales = random_scales(ROWS, 3)
    parts = {**store_packed(codes, None, scales, 4), "weight_zero_point": signed(zeros, 4)}
    weight = read_module(tmp_path, parts, settings("pack-quantized", scheme(symmetric=False)))
    expected = expected_weight(codes, zeros, scales, lambda k: k // 20)
    assert torch.equal(to_float(weight).double(), expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_group_index(tmp_path: Path, symmetric: bool) -> None:
    codes, scales = random_codes(ROWS, COLUMNS, 4, seed=1), random_scales(ROWS, 3)
    zeros = [[8] * 3] * ROWS if symmetric else random_codes(ROWS, 3, 4, seed=2)
    parts = store_packed(codes, None if symmetric else zeros, scales, 4)
    quantization = settings("pack-quantized", scheme(symmetric=symmetric, actorder="group"))
    group_index = [k % 3 for k in range(COLUMNS)]
    parts["weight_g_idx"] = torch.tensor(group_index, dtype=torch.int32)
    weight = read_module(tmp_path, parts, quantization)
    assert isinstance(weight, torch.Tensor)
    assert torch.equal(weight.double(), expected_weight(codes, zeros, scales, lambda k: group_index[k]))
    # In order, and not set.
    for values in ([k // 20 for k in range(COLUMNS)], [-1] * COLUMNS):
        parts["weight_g_idx"] = torch.tensor(values, dtype=torch.int32)
        weight = read_module(tmp_path, parts, quantization)
        assert isinstance(weight, GridWeight)
        expected = expected_weight(codes, zeros, scales, lambda k: k // 20)
        assert torch.equal(weight.dequantize().double(), expected)


def codes_of(weight: Weight) -> torch.dtype:
    assert isinstance(weight, GridWeight)
    return weight.codes.dtype


def test_names_beat_patterns_and_patterns_classes(tmp_path: Path) -> None:
    """One group has 8 bits and whole rows, the other 4 bits and groups: tensors fit one of them only."""
    codes8, codes4 = random_codes(ROWS, COLUMNS, 8, seed=1), random_codes(ROWS, COLUMNS, 4, seed=1)
    eight = store_packed(codes8, None, random_scales(ROWS, 1), 8)
    four = store_packed(codes4, None, random_scales(ROWS, 3), 4)
    modules = {
        "model.layers.0.mlp.up_proj": four,
        "model.layers.0.mlp.down_proj": eight,
        "model.layers.1.mlp.down_proj": four,
        "model.embed_tokens": eight,
    }
    tensors = {f"{name}.{part}": tensor for name, parts in modules.items() for part, tensor in parts.items()}
    groups = [
        {**scheme(), "targets": ["Linear", "model.layers.1.mlp.down_proj"]},
        {**scheme(8, "channel"), "targets": ["re:.*down_proj$", "Embedding"]},
        {"targets": ["re:.*"], "weights": None},
    ]
    checkpoint = write_directory(tmp_path, tensors, settings("pack-quantized", *groups))
    assert checkpoint.names() == {f"{name}.weight" for name in modules}
    for name, parts in modules.items():
        expected = torch.int8 if parts is eight else torch.uint8
        assert codes_of(checkpoint.tensor(f"{name}.weight")) == expected


def test_groups_with_formats_of_their_own(tmp_path: Path) -> None:
    codes, scales = random_codes(ROWS, COLUMNS, 8, seed=1), random_scales(ROWS, 1)
    groups = [
        {**scheme(8, "channel"), "targets": ["re:.*up_proj"], "format": "pack-quantized"},
        {**scheme(8, "channel"), "targets": ["re:.*down_proj"], "format": "int-quantized"},
    ]
    modules = {
        "model.up_proj": store_packed(codes, None, scales, 8),
        "model.down_proj": {"weight": signed(codes, 8), "weight_scale": scales},
    }
    tensors = {f"{name}.{part}": tensor for name, parts in modules.items() for part, tensor in parts.items()}
    checkpoint = write_directory(tmp_path, tensors, settings("mixed-precision", *groups))
    for name in modules:
        weight = checkpoint.tensor(f"{name}.weight")
        assert isinstance(weight, GridWeight)
        assert torch.equal(weight.codes, signed(codes, 8))


def test_what_is_not_quantized(tmp_path: Path) -> None:
    """Floats stay; scales of activations and of the cache are no weights."""
    codes, scales = random_codes(ROWS, COLUMNS, 8, seed=1), random_scales(ROWS, 1)
    floats = {"lm_head.weight": torch.rand(4, 8).bfloat16(), "model.norm.weight": torch.rand(8)}
    tensors = {
        **floats,
        f"{MODULE}.weight": signed(codes, 8),
        f"{MODULE}.weight_scale": scales,
        f"{MODULE}.bias": torch.rand(ROWS),
        f"{MODULE}.input_scale": torch.ones(1),
        "model.layers.0.self_attn.k_scale": torch.ones(1),
        "model.layers.0.self_attn.k_proj.output_scale": torch.ones(1),
    }
    # The key of compressed-tensors' first releases.
    quantization = settings("int-quantized", scheme(8, "channel"))
    checkpoint = write_directory(tmp_path, tensors, None, compression_config=quantization)
    # The scales of a cache stay: whoever loads the model says that they are not used.
    cache = "model.layers.0.self_attn.k_scale"
    assert checkpoint.names() == {*floats, f"{MODULE}.weight", f"{MODULE}.bias", cache}
    for name, tensor in floats.items():
        stored = checkpoint.tensor(name)
        assert isinstance(stored, torch.Tensor)
        assert torch.equal(stored, tensor)


def test_names_behind_a_multimodal_wrapper(tmp_path: Path) -> None:
    """Targets are names of the wrapper's modules; the parts are found behind its prefix."""
    codes, scales = random_codes(ROWS, COLUMNS, 4, seed=1), random_scales(ROWS, 3)
    name = "language_model.model.layers.0.mlp.down_proj"
    tensors = {f"{name}.{part}": tensor for part, tensor in store_packed(codes, None, scales, 4).items()}
    quantization = settings("pack-quantized", {**scheme(), "targets": [name]})
    checkpoint = write_directory(tmp_path, tensors, quantization, text_config={"model_type": "llama"})
    assert checkpoint.names() == {f"{MODULE}.weight"}
    weight = checkpoint.tensor(f"{MODULE}.weight")
    assert isinstance(weight, GridWeight)
    assert weight.codes.tolist() == codes


@pytest.mark.parametrize("strategy", ["group", "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized"])
def test_a_module_as_the_library_stores_and_reads_it(
    tmp_path: Path, layout: str, bits: int, symmetric: bool, strategy: str
) -> None:
    library = pytest.importorskip("compressed_tensors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    utils = pytest.importorskip("compressed_tensors.quantization.utils")
    arguments = quantization.QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=20 if strategy == "group" else None
    )
    stored_scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments, format=layout)
    values = torch.randn(ROWS, COLUMNS)
    groups = values.view(ROWS, -1, 20) if strategy == "group" else values.view(ROWS, 1, COLUMNS)
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    if strategy == "tensor":
        low, high = low.amin().view(1), high.amax().view(1)
    scale, zero = utils.calculate_qparams(low, high, arguments)
    compressor = library.BaseCompressor.get_value_from_registry(layout)
    state = {"weight": values, "weight_scale": scale, "weight_zero_point": zero}
    parts = compressor.compress(state, stored_scheme)
    assert ("weight_zero_point" in parts) == (not symmetric)
    config = quantization.QuantizationConfig(
        config_groups={"group_0": stored_scheme}, format=layout, quantization_status="compressed"
    )
    weight = read_module(
        tmp_path, parts, {"quant_method": "compressed-tensors", **config.model_dump(mode="json")}
    )
    expected = compressor.decompress(parts, stored_scheme)["weight"]
    # Half an ulp of two products and a sum of numbers below 16, here; the library rounds a product once.
    assert torch.all((to_float(weight) - expected).abs() <= 16 * 4 * 2**-24)
    step = scale.max() * (0.5 if symmetric else 1.0)
    # A symmetric grid has one step less above zero than below; an asymmetric one rounds its zero too.
    assert torch.all((to_float(weight) - values).abs() <= step * 1.01)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("model.layers.0.mlp.up_proj", ["Linear"]),
        ("model.layers.0.mlp.up_proj", ["Embedding"]),
        ("model.layers.0.mlp.up_proj", ["re:.*up_proj"]),
        ("model.layers.0.mlp.up_proj", ["re:up_proj"]),  # a pattern begins where the name does
        ("model.layers.0.mlp.up_proj", ["model.layers.0.mlp.up_proj"]),
        ("model.layers.0.mlp.up_proj", ["up_proj"]),
        ("model.layers.0.mlp.up_proj", ["re:model.layers.1", "re:model.layers.0"]),
        ("lm_head", ["Linear"]),
    ],
)
def test_targets_match_as_in_the_library(tmp_path: Path, name: str, targets: list[str]) -> None:
    match = pytest.importorskip("compressed_tensors.utils.match")
    codes, scales = random_codes(ROWS, COLUMNS, 4, seed=1), random_scales(ROWS, 3)
    tensors = {f"{name}.{part}": tensor for part, tensor in store_packed(codes, None, scales, 4).items()}
    quantization = settings("pack-quantized", {**scheme(), "targets": targets})
    checkpoint = write_directory(tmp_path, tensors, quantization)
    if match.is_match(name, torch.nn.Linear(1, 1), targets, ["lm_head"]):
        assert isinstance(checkpoint.tensor(f"{name}.weight"), GridWeight)
    else:
        assert_refused(lambda: checkpoint.tensor(f"{name}.weight"), name, "config_groups")


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        (settings("float-quantized", scheme()), ["group_0.weights.type", "float", "int"]),
        (settings("marlin-24", scheme()), ["format", "marlin-24"]),
        (settings("mixed-precision", scheme()), ["format", "mixed-precision"]),
        (settings("pack-quantized", scheme(type="float")), ["group_0.weights.type", "float"]),
        (settings("pack-quantized", scheme(bits=3)), ["num_bits", "3"]),
        (settings("pack-quantized", scheme(strategy="block")), ["strategy", "block", "channel"]),
        (settings("pack-quantized", scheme(strategy="tensor_group")), ["strategy", "tensor_group"]),
        (settings("pack-quantized", scheme(group_size=-1)), ["group_size", "-1"]),
        (settings("pack-quantized", scheme(symmetric="yes")), ["symmetric", "yes"]),
        (settings("pack-quantized", {**scheme(), "targets": "Linear"}), ["group_0.targets", "list"]),
        (settings("pack-quantized", {**scheme(), "targets": ["re:("]}), ["group_0.targets", "regular"]),
        (settings("pack-quantized", scheme(), ignore=["re:["]), ["ignore", "regular"]),
        (settings("pack-quantized", scheme(), config_groups=[]), ["config_groups", "object"]),
        (
            settings("pack-quantized", scheme(), sparsity_config={"format": "sparse-24-bitmask"}),
            ["sparse-24"],
        ),
        (settings("pack-quantized", scheme(), transform_config={"config_groups": {"u": {}}}), ["transform"]),
    ],
)
def test_unsupported_settings_are_refused(
    tmp_path: Path, quantization: dict[str, Any], words: list[str]
) -> None:
    tensors = {"model.norm.weight": torch.ones(2)}
    assert_refused(lambda: write_directory(tmp_path, tensors, quantization), "config.json", *words)


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("weight_packed", None, ["missing"]),
        ("weight_scale", None, ["missing"]),
        ("weight_shape", None, ["missing"]),
        ("weight_zero_point", None, ["missing"]),
        ("weight_packed", lambda tensor: tensor.long(), ["int32", "int64"]),
        ("weight_packed", lambda tensor: tensor[:, 1:], ["[21, 8]", "[21, 7]"]),
        ("weight_shape", lambda tensor: tensor[1:], ["[2]", "[1]"]),
        ("weight_shape", lambda tensor: tensor - 60, ["two sizes", "[-39, 0]"]),
        ("weight_scale", lambda tensor: tensor[:, 1:], ["[21, 3]", "[21, 2]"]),
        ("weight_scale", lambda tensor: tensor.to(torch.float8_e4m3fn), ["float16", "float8_e4m3fn"]),
        ("weight_zero_point", lambda tensor: tensor[1:], ["[3, 3]", "[2, 3]"]),
        ("weight_zero_point", lambda tensor: tensor.long(), ["int8 or int32", "int64"]),
        ("weight_g_idx", lambda tensor: tensor + 1, ["groups of 0 to 2", "1 to 3"]),
        ("weight_g_idx", lambda tensor: tensor[1:], ["[60]", "[59]"]),
    ],
)
def test_damaged_packed_tensors_are_named(tmp_path: Path, part: str, change: Any, words: list[str]) -> None:
    codes, zeros = random_codes(ROWS, COLUMNS, 4, seed=1), random_codes(ROWS, 3, 4, seed=2)
    parts = store_packed(codes, zeros, random_scales(ROWS, 3), 4)
    parts["weight_g_idx"] = torch.tensor([k // 20 for k in range(COLUMNS)], dtype=torch.int32)
    quantization = settings("pack-quantized", scheme(symmetric=False))
    if change is None:
        del parts[part]
    else:
        parts[part] = change(parts[part])
    assert_refused(
        lambda: read_module(tmp_path, parts, quantization), f"{MODULE}.{part}", str(tmp_path), *words
    )


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("weight", None, ["missing"]),
        ("weight_scale", None, ["float16", "int8"]),
        ("weight", lambda tensor: tensor.float(), ["int8", "float32"]),
        ("weight", lambda tensor: tensor + 8, ["codes of -8 to 7", "15"]),
        ("weight_scale", lambda tensor: tensor[1:], ["[21, 3]", "[20, 3]"]),
    ],
)
def test_damaged_bytes_are_named(tmp_path: Path, part: str, change: Any, words: list[str]) -> None:
    parts = {
        "weight": signed(random_codes(ROWS, COLUMNS, 4, seed=1), 4),
        "weight_scale": random_scales(ROWS, 3),
    }
    if change is None:
        del parts[part]
    else:
        parts[part] = change(parts[part])
    named = "weight" if words == ["float16", "int8"] else part
    assert_refused(
        lambda: read_module(tmp_path, parts, settings("int-quantized", scheme())),
        f"{MODULE}.{named}",
        str(tmp_path),
        *words,
    )


def test_a_tensor_with_several_scales_is_refused(tmp_path: Path) -> None:
    parts = {"weight": torch.ones(2, 4, dtype=torch.int8), "weight_scale": torch.ones(2)}
    assert_refused(
        lambda: read_module(tmp_path, parts, settings("int-quantized", scheme(8, "tensor"))),
        f"{MODULE}.weight_scale",
        "one number",
        "[2]",
    )


def test_ignored_modules_cannot_be_quantized(tmp_path: Path) -> None:
    codes, scales = random_codes(ROWS, COLUMNS, 4, seed=1), random_scales(ROWS, 3)
    quantization = settings("pack-quantized", scheme(), ignore=["re:.*down_proj"])
    assert_refused(
        lambda: read_module(tmp_path, store_packed(codes, None, scales, 4), quantization), MODULE, "target"
    )
