"""Rotations: orthogonal at models' widths, the matrix that is applied, and models they leave as they are."""

from __future__ import annotations

import pytest
import torch

from engine.compression.hadamard import (
    make_rotation,
    rotate_ends,
    rotate_inputs,
    rotate_layer,
    rotate_outputs,
)

# Powers of two, both of Paley's constructions, the models' widths, and what is left to cosines: 3, 9, 18, 46, 172.
HADAMARD_WIDTHS = [1, 2, 64, 12, 20, 28, 36, 44, 96, 104, 576, 896, 1536]
WIDTHS = [*HADAMARD_WIDTHS, 3, 9, 18, 46, 172]


def sylvester(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1).double()
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1, 1], [1, -1]]).double(), matrix)
    return matrix / size**0.5


@pytest.mark.parametrize("width", WIDTHS)
def test_the_matrix_is_orthogonal(width: int) -> None:
    matrix = make_rotation(width, 0).matrix()
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(width).double())


@pytest.mark.parametrize("width", HADAMARD_WIDTHS)
def test_entries_are_even_where_a_hadamard_matrix_is_known(width: int) -> None:
    matrix = make_rotation(width, 0).matrix()
    torch.testing.assert_close(matrix.abs(), torch.full((width, width), width**-0.5).double())


@pytest.mark.parametrize("width", WIDTHS)
def test_the_matrix_is_the_kronecker_product(width: int) -> None:
    rotation = make_rotation(width, 1)
    product = torch.kron(sylvester(width // len(rotation.factor)), rotation.factor)
    torch.testing.assert_close(rotation.matrix(), rotation.signs.diag() @ product)


@pytest.mark.parametrize("width", WIDTHS)
def test_applying_multiplies_with_the_matrix_and_inverting_undoes_it(width: int) -> None:
    rotation = make_rotation(width, 2)
    x = torch.randn(3, 2, width).double()
    torch.testing.assert_close(rotation.apply(x), x @ rotation.matrix())
    torch.testing.assert_close(rotation.invert(x), x @ rotation.matrix().t())
    torch.testing.assert_close(rotation.invert(rotation.apply(x)), x)


def test_seeds_make_rotations() -> None:
    assert torch.equal(make_rotation(96, 5).matrix(), make_rotation(96, 5).matrix())
    assert not torch.equal(make_rotation(96, 5).matrix(), make_rotation(96, 6).matrix())


@pytest.mark.parametrize("width", [64, 96, 576, 1536])
def test_outliers_are_spread(width: int) -> None:
    x = torch.randn(50, width)
    x[:, 7] = 200
    rotated = make_rotation(width, 0).apply(x)

    def peak(x: torch.Tensor) -> torch.Tensor:
        return x.abs().amax(dim=1) / x.square().mean(dim=1).sqrt()

    # One outlier alone becomes even; the others are a normal distribution, seldom beyond five deviations.
    assert torch.all(peak(rotated) < 2.5)
    assert torch.all(peak(x) > 5)


def test_both_sides_of_a_weight() -> None:
    weight, x = torch.randn(20, 96).double(), torch.randn(7, 96).double()
    inside, outside = make_rotation(96, 0), make_rotation(20, 1)
    torch.testing.assert_close(inside.apply(x) @ rotate_inputs(weight, inside).t(), x @ weight.t())
    torch.testing.assert_close(x @ rotate_outputs(weight, outside).t(), outside.apply(x @ weight.t()))


Layer = dict[str, torch.Tensor]


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight


def linear(x: torch.Tensor, layer: Layer, name: str) -> torch.Tensor:
    return torch.nn.functional.linear(x, layer[name], layer.get(f"{name}_bias"))


def run_layer(x: torch.Tensor, layer: Layer, offset: float) -> torch.Tensor:
    """A decoder layer of one head with a norm over queries."""
    normed = rms_norm(x, layer["attention_norm"] + offset)
    query, key, value = (linear(normed, layer, name) for name in ("q", "k", "v"))
    if "q_norm" in layer:
        query = rms_norm(query, layer["q_norm"] + offset)
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    x = x + linear(attended, layer, "o")
    normed = rms_norm(x, layer["mlp_norm"] + offset)
    gated = torch.nn.functional.silu(linear(normed, layer, "gate")) * linear(normed, layer, "up")
    return x + linear(gated, layer, "down")


def make_layer(width: int, has_extras: bool) -> Layer:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).double() * shape[-1] ** -0.5

    layer = {
        "attention_norm": random(width) + 1,
        "mlp_norm": random(width) + 1,
        "o": random(width, 8),
        "down": random(width, 40),
    }
    layer |= {name: random(8, width) for name in ("q", "k", "v")}
    layer |= {name: random(40, width) for name in ("gate", "up")}
    if has_extras:
        layer |= {
            f"{name}_bias": random(len(layer[name])) for name in ("q", "k", "v", "o", "gate", "up", "down")
        }
        layer["q_norm"] = random(8)
    return layer


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("has_extras", [False, True])
@pytest.mark.parametrize("width", [24, 36])
def test_a_rotated_decoder_gives_the_same_logits(offset: float, has_extras: bool, width: int) -> None:
    rotation = make_rotation(width, 3)
    embedding, norm = torch.randn(50, width).double(), torch.rand(width).double() + 0.5
    layers = [make_layer(width, has_extras) for _ in range(3)]
    ends = rotate_ends(embedding, norm, embedding, rotation, offset)
    tokens = torch.randint(0, 50, (9,))

    x, rotated = embedding[tokens], ends["embedding"][tokens]
    for layer in layers:
        x = run_layer(x, layer, offset)
        rotated = run_layer(rotated, rotate_layer(layer, rotation, offset), offset)
        torch.testing.assert_close(rotated, rotation.apply(x))
    logits = rms_norm(x, norm + offset) @ embedding.t()
    rotated_logits = rms_norm(rotated, ends["norm"] + offset) @ ends["head"].t()
    torch.testing.assert_close(rotated_logits, logits)


def test_norms_before_the_residual_sum_are_refused() -> None:
    layer = make_layer(24, False) | {"attention_post_norm": torch.ones(24)}
    with pytest.raises(ValueError, match="attention_post_norm"):
        rotate_layer(layer, make_rotation(24, 0), 1.0)
