"""The list of C operations: it is one for C and Python, and a wrong call is refused before any C code sees it."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.kernels import cpu
from engine.kernels.cpu.signatures import Argument, Operation, Parameter
from engine.kernels.norm import rms_norm
from tests.helpers.c_operations import write_sources

LIBRARY = cpu.library()
OPERATIONS = {} if LIBRARY is None else LIBRARY.operations

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="there is no C compiler on this machine")

Call = Callable[..., None]


def call_now(name: str, num_rows: int | torch.Tensor, **arguments: Argument) -> None:
    cpu.run(name, num_rows, **arguments)


def record(name: str, num_rows: int | torch.Tensor, **arguments: Argument) -> None:
    """Within a program that is never run; a call that is refused leaves no trace in it."""
    program = cpu.Program(num_threads=1)
    with program.recording(torch.zeros(1, dtype=torch.int64)):
        try:
            cpu.run(name, num_rows, **arguments)
        except TypeError:
            assert program.names == []
            raise
    assert program.names == [name]


CALLS = pytest.mark.parametrize("call", [call_now, record], ids=["called", "recorded"])

EVERY_OPERATION = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)


def right(parameter: Parameter) -> Argument:
    if parameter.kind in ("int", "float"):
        return {"int": 1, "float": 1.0}[parameter.kind]
    return torch.zeros(1, dtype=parameter.dtype)


def wrong(parameter: Parameter) -> list[Argument]:
    """What an argument must not be, with what is likeliest confused first."""
    tensor = torch.zeros(1)
    if parameter.kind == "int":
        return [1.0, True, None, tensor]
    if parameter.kind == "float":
        return [1, True, None, tensor]
    values: list[Argument] = [1, 1.0, torch.zeros(1, dtype=parameter.dtype, device="meta")]
    if parameter.dtype is not None:
        values += [torch.zeros(1, dtype=dtype) for dtype in (torch.float64, torch.bfloat16)]
    return values if parameter.is_optional else [*values, None]


def right_arguments(operation: Operation) -> dict[str, Argument]:
    return {each.name: right(each) for each in operation.parameters}


def call_with(call: Call, operation: Operation, arguments: dict[str, Argument]) -> str:
    """The message with which a call is refused."""
    rest = {name: value for name, value in arguments.items() if name != "num_rows"}
    with pytest.raises(TypeError) as error:
        call(operation.name, arguments["num_rows"], **rest)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_all_operations_have_signatures() -> None:
    assert len(OPERATIONS) == 29
    for operation in OPERATIONS.values():
        assert operation.parameters[0] == Parameter("num_rows", "int64", is_optional=False)
        assert len({parameter.name for parameter in operation.parameters}) == len(operation.parameters)


@CALLS
@EVERY_OPERATION
def test_each_wrong_argument_is_refused(call: Call, operation: Operation) -> None:
    for parameter in operation.parameters:
        for value in wrong(parameter):
            if parameter.name == "num_rows" and isinstance(value, int):
                continue  # which `run` makes a tensor of
            message = call_with(call, operation, {**right_arguments(operation), parameter.name: value})
            assert message.startswith(
                f"{operation.name}: {parameter.name} must be {parameter.expected}, got "
            )
            if isinstance(value, torch.Tensor):
                assert str(value.dtype).removeprefix("torch.") in message
                assert str(value.device) in message
            else:
                assert repr(value) in message


@CALLS
@EVERY_OPERATION
def test_each_missing_argument_is_refused(call: Call, operation: Operation) -> None:
    for parameter in operation.parameters[1:]:  # Python itself asks for the number of rows
        arguments = right_arguments(operation)
        del arguments[parameter.name]
        message = call_with(call, operation, arguments)
        assert message.startswith(f"{operation.name}: {parameter.name} is missing, it takes num_rows, ")


@CALLS
@EVERY_OPERATION
def test_unknown_arguments_are_refused(call: Call, operation: Operation) -> None:
    message = call_with(call, operation, {**right_arguments(operation), "nonsense": 1})
    assert message.startswith(f"{operation.name}: nonsense is unknown, it takes num_rows, ")


@EVERY_OPERATION
def test_what_is_asked_for_is_taken(operation: Operation) -> None:
    """So that what the tests above change by one argument was right before."""
    arguments = right_arguments(operation)
    rest = {name: value for name, value in arguments.items() if name != "num_rows"}
    record(operation.name, 1, **rest)
    for parameter in operation.parameters:
        if parameter.is_optional:
            record(operation.name, 1, **{**rest, parameter.name: None})


def test_an_epsilon_of_1_is_refused_where_1_0_is_meant() -> None:
    x, weight = torch.randn(2, 64), torch.ones(64)
    rms_norm(x, weight, 1.0)
    with pytest.raises(TypeError) as error:
        rms_norm(x, weight, 1)
    assert str(error.value) == "rms_norm: epsilon must be of type float, got 1 of type int"


def test_words_lie_as_the_c_structs_have_them() -> None:
    delta = torch.zeros(1, 4)
    arguments: dict[str, Argument] = {
        "num_rows": torch.ones(1, dtype=torch.int64),
        "x": torch.zeros(1, 4),
        "delta": delta,
        "weight": torch.zeros(4),
        "epsilon": 1.5,
        "size": -4,
        "output": None,
        "is_rotated": 1,
        "spread": 0.0,
        "low": None,
        "tokens": None,
        "quads": None,
        "stride": 64,
    }
    operation = OPERATIONS["rms_norm"]
    assert [parameter.name for parameter in operation.parameters] == list(arguments)
    words = operation.words(dict(reversed(arguments.items())))
    assert words[2] == delta.data_ptr()
    assert bytes(words)[32:40] == bytes(ctypes.c_double(1.5))
    assert list(words[5:]) == [-4, 0, 1, 0, 0, 0, 0, 64]


@pytest.mark.parametrize("name", cpu.FUNCTIONS)
def test_other_functions_know_what_they_take(name: str) -> None:
    assert LIBRARY is not None
    function = getattr(LIBRARY.functions, name)
    returned, taken = cpu.FUNCTIONS[name]
    assert function.restype is returned
    assert tuple(function.argtypes) == taken
    if taken:  # C ignores what a function without arguments is passed, and so does ctypes
        with pytest.raises(TypeError):
            function()
        with pytest.raises(ctypes.ArgumentError):
            function(*[0.5] * len(taken))


def test_nothing_else_of_the_library_is_called() -> None:
    """Functions without declared types are called with whatever they get."""
    root = Path(cpu.__file__).parents[2]
    texts = [path.read_text() for path in root.rglob("*.py")]
    called = {name for text in texts for name in re.findall(r"\.functions\.(\w+)", text)}
    assert called == set(cpu.FUNCTIONS) - {"enable_tiles"}  # called while the library is loaded


SIGNATURE = """
SIGNATURE(twice,
    READS(float, x)
    WRITES(float, y)
    INTEGER(size)
)
"""

BODY = """
OPERATION(twice) {
    const int64_t rows = count(args->num_rows);
    FOR_ROWS(m, rows)
        for (int64_t i = m * args->size; i < (m + 1) * args->size; i++) args->y[i] = 2 * args->x[i];
}
"""


def build(directory: Path, signatures: str, bodies: str) -> subprocess.CompletedProcess[str]:
    """A library of these operations alone, with the compiler and the flags of the real one."""
    assert LIBRARY is not None
    write_sources(directory, signatures, bodies)
    sources = [directory / "operations.c", directory / "bodies.c"]
    command = [
        os.environ.get("CC", "cc"),
        *cpu.LEVELS[LIBRARY.level].flags,
        *cpu.FLAGS,
        "-o",
        str(directory / "library.so"),
    ]
    return subprocess.run(
        [*command, *map(str, sources), "-lm"], capture_output=True, text=True, check=False, timeout=300
    )


def test_lists_that_agree_build(tmp_path: Path) -> None:
    done = build(tmp_path, SIGNATURE, BODY)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("signatures", "bodies", "complaint"),
    [
        pytest.param(SIGNATURE, BODY + BODY.replace("twice", "thrice"), "thrice_arguments", id="no entry"),
        pytest.param(SIGNATURE + SIGNATURE.replace("twice", "thrice"), BODY, "thrice", id="no body"),
        pytest.param(SIGNATURE + SIGNATURE, BODY, "twice_arguments", id="two entries"),
        pytest.param(SIGNATURE, BODY.replace("args->y", "args->z"), "'z'", id="unknown argument"),
        pytest.param(
            SIGNATURE, BODY.replace("args->y", "args->x"), "read-only", id="what is read is written"
        ),
        pytest.param(SIGNATURE.replace("INTEGER(size)", "READS(float, size)"), BODY, "*", id="other kind"),
        pytest.param(
            SIGNATURE,
            BODY.replace("const int64_t rows", "const int32_t *x = args->x; const int64_t rows"),
            "incompatible",
            id="other elements",
        ),
        pytest.param(
            SIGNATURE.replace("float, x", "double, x"), BODY, "ELEMENT_double", id="unknown elements"
        ),
    ],
)
def test_lists_that_differ_do_not_build(
    tmp_path: Path, signatures: str, bodies: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    done = build(tmp_path, signatures, bodies)
    assert done.returncode != 0
    assert complaint in done.stderr
