"""The C library: which is built, what is said where there is none, and that torch's operators take its place."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from engine.errors import ConfigError
from engine.kernels import cpu
from engine.kernels.activation import gelu_mul, gelu_reference, silu_mul, silu_reference
from engine.kernels.norm import add, reference, rms_norm
from engine.quant.floating import Float
from engine.quant.int4 import Int4
from engine.quant.int8 import Int8

REMEDY = "install a C compiler (gcc 11 or newer) or set CC, and unset ENGINE_CPU_KERNELS"


@pytest.fixture
def fresh_lookup(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The next look for the library goes by the environment, as in a new process."""
    monkeypatch.delenv(cpu.VARIABLE, raising=False)
    cpu.library.cache_clear()
    yield
    cpu.library.cache_clear()


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library", lambda: None)


def test_describe_names_the_level() -> None:
    loaded = cpu.library()
    if loaded is None:
        pytest.skip("there is no C compiler on this machine")
    assert cpu.describe() == f"C kernels for {loaded.level}"
    assert cpu.LEVELS[loaded.level].needs <= cpu.processor_flags()


@pytest.mark.usefixtures("fresh_lookup")
@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("no-such-compiler", "there is no C compiler no-such-compiler"),
        ("false", "could not build the CPU kernels"),
    ],
)
def test_a_compiler_that_is_missing_or_fails_is_said_and_survived(
    compiler: str, message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", compiler)
    with caplog.at_level("WARNING"):
        assert cpu.library() is None
    assert [message in record.getMessage() for record in caplog.records] == [True]
    assert cpu.describe().startswith("torch's operators")
    assert cpu.describe().endswith(REMEDY)
    assert not cpu.serves(torch.zeros(1))


@pytest.mark.usefixtures("fresh_lookup")
def test_torchs_operators_may_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(cpu.VARIABLE, "torch")
    assert cpu.library() is None
    assert not caplog.records
    assert cpu.describe().endswith(REMEDY)


@pytest.mark.usefixtures("fresh_lookup")
def test_an_unknown_level_is_refused_with_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.VARIABLE, "nonsense")
    with pytest.raises(ConfigError) as error:
        cpu.library()
    expected = f"ENGINE_CPU_KERNELS must be torch or one of {', '.join(cpu.LEVELS)}, got 'nonsense'"
    assert str(error.value) == expected


@pytest.mark.usefixtures("fresh_lookup")
def test_a_level_that_the_processor_lacks_is_refused_with_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = cpu.processor_flags() - {"amx_int8"}
    monkeypatch.setattr(cpu, "processor_flags", lambda: flags | {"amx_tile", "avx512_vnni"})
    monkeypatch.setenv(cpu.VARIABLE, "amx")
    with pytest.raises(ConfigError) as error:
        cpu.library()
    assert str(error.value) == "ENGINE_CPU_KERNELS=amx: this processor lacks amx_int8"


def test_the_server_refuses_a_level_in_one_line() -> None:
    level = "nonsense" if cpu.LEVELS["amx"].needs <= cpu.processor_flags() else "amx"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "engine.serve",
            "--model",
            "llama",
            "--device",
            "cpu",
            "--load-format",
            "dummy",
        ],
        env={**os.environ, cpu.VARIABLE: level},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode != 0
    assert sum("ENGINE_CPU_KERNELS" in line for line in done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("without_library")
def test_without_a_library_torchs_operators_serve() -> None:
    x, weight, delta = torch.randn(2, 64), torch.randn(64), torch.randn(2, 64)
    torch.testing.assert_close(silu_mul(x), silu_reference(x), rtol=0, atol=0)
    torch.testing.assert_close(gelu_mul(x), gelu_reference(x), rtol=0, atol=0)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), reference(x, weight, 1e-5))
    summed = x + delta
    assert torch.equal(add(x, delta), summed)


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 33])
@pytest.mark.parametrize("scheme", [Int8(), Int4(32), Int4(128)], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (17, 33), (3, 2), (5, 1), (129, 576), (16, 50)])
def test_products_are_equal_to_the_bit_without_it(
    rows: int, columns: int, scheme: Int8 | Int4, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, x, bias = (
        scheme.quantize(torch.randn(rows, columns)),
        torch.randn(num_tokens, columns),
        torch.randn(rows),
    )
    x[0, 0] = 1000.0
    in_c = scheme.bind(stored, bias)(x)
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert torch.equal(scheme.bind(stored, bias)(x), in_c)


@pytest.mark.usefixtures("without_library")
def test_a_float_product_is_torchs_without_it() -> None:
    weight, x = torch.randn(17, 33), torch.randn(5, 33)
    product = Float(torch.float32).bind({"weight": weight}, None)(x)
    assert torch.equal(product, torch.nn.functional.linear(x, weight))
