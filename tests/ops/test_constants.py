"""Numbers and codes that Python, C++ and Triton share: equal name by name, and none is missing anywhere."""

import importlib.util
from enum import IntEnum

import pytest

from deqfast.ops import codes
from deqfast.ops.broyden import BroydenWorkspace
from deqfast.ops.native import extension
from deqfast.status import Status

built = pytest.mark.skipif(extension._C is None, reason="the extension is not built")


def python_constants() -> dict[str, float]:
    found: dict[str, float] = {f"Status.{member.name}": member for member in Status}
    found |= {f"Block.{name}": i for i, name in enumerate(codes.BLOCKS)}
    for name, value in vars(codes).items():
        if isinstance(value, type) and issubclass(value, IntEnum) and value is not IntEnum:
            found |= {f"{name}.{member.name}": member for member in value}
        elif name.isupper() and isinstance(value, (int, float)):
            found[name] = value
    return {name: float(value) for name, value in found.items()}


OF_THE_HOST = BroydenWorkspace.GRAM_MIN_N  # as it is imported: tests on emulated kernels see that of a GPU


@built
def test_constants_of_python_and_of_cpp_are_the_same():
    assert extension._C.constants() == python_constants()


@built
def test_where_broyden_changes_its_form_is_the_same_in_python_and_cpp():
    regimes = extension._C.regimes()
    assert regimes["GRAM_MIN_N"] == OF_THE_HOST
    assert regimes["GPU_GRAM_MIN_N"] == BroydenWorkspace.DEVICE_GRAM_MIN_N
    assert regimes["TINY"] == codes.TINY


TRITON = {"SCALE_BLOCK": "BLOCK", "INPUT": "Block.x"}
OF_TRITON_ALONE = {"NO_BALL", "L2", "LINF", "RETURN_BEST", "RETURN_LAST", "RETURN_COST"}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_constants_of_triton_are_those_of_python():
    from deqfast.kernels import constants

    python = python_constants()
    by_member = {name.split(".")[-1]: value for name, value in python.items()}
    found = {name: float(value.value) for name, value in vars(constants).items() if name.isupper()}
    for name in found.keys() - OF_TRITON_ALONE:
        expected = python.get(TRITON.get(name, name), by_member.get(TRITON.get(name, name)))
        assert found[name] == expected, name
    needed = {name for name in python if name.split(".")[0] in ("Int", "Real", "At", "Evict")}
    assert {name.split(".")[1] for name in needed} <= found.keys()


@built
def test_the_codes_of_triton_alone_are_those_of_cpp():
    constants = pytest.importorskip("deqfast.kernels.constants", reason="triton is not installed")
    returns, ball = extension._C.Returns, extension._C.Ball
    expected = {
        "NO_BALL": ball.none,
        "L2": ball.l2,
        "LINF": ball.linf,
        "RETURN_BEST": returns.best,
        "RETURN_LAST": returns.last,
        "RETURN_COST": returns.cost,
    }
    assert expected.keys() == OF_TRITON_ALONE
    for name, value in expected.items():
        assert vars(constants)[name].value == int(value), name
