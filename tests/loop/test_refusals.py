"""A wrong call says which argument is wrong, what was expected and what came, before f is evaluated."""

from __future__ import annotations

import pytest
import torch
from problems import (
    BACKENDS,
    problem,
    solve,
)

import deqfast as dq
from deqfast.ops.native import extension as native


def never(*_):
    raise AssertionError("f was called before the arguments were checked")


# ---- refused before any work ----

Z = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("z0", "error", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, r"z0 must be float64, .* got torch.int64"),
        (torch.zeros(2, 3, dtype=torch.bool), TypeError, r"z0 must be float64, .* got torch.bool"),
        (torch.tensor(1.0), ValueError, r"z0 must have a batch dimension .* 0-dimensional"),
        ((), ValueError, r"z0 must hold at least one tensor, got an empty tuple"),
        ({}, ValueError, r"z0 must hold at least one tensor, got an empty dict"),
        ((Z, 1.0), TypeError, r"z0 must hold only tensors, got a float"),
        (None, TypeError, r"z0 must hold only tensors, got a NoneType"),
        ([1.0, 2.0], TypeError, r"z0 must hold only tensors, got a float"),
        ((Z, torch.zeros(4, 3)), ValueError, r"tensors of z0 must share dim 0 .* got 2 and 4"),
        ((Z, Z.double()), TypeError, r"tensors of z0 must share one precision, got torch.float32 and torch.float64"),
        ((Z, Z.to("meta")), ValueError, r"tensors of z0 must be on one device, got cpu and meta"),
        (Z.to_sparse(), TypeError, r"z0 must be a dense \(strided\) tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_start_raises(z0, error, message):
    with pytest.raises(error, match=message):
        dq.fixed_point(never, z0)
    with pytest.raises(error, match=message):
        dq.Anderson().init(z0)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"rtol": -1e-3}, ValueError, r"rtol must be finite and not negative, got -0.001"),
        ({"rtol": float("nan")}, ValueError, r"rtol must be finite and not negative, got nan"),
        ({"rtol": float("inf")}, ValueError, r"rtol must be finite and not negative, got inf"),
        ({"rtol": "1e-3"}, TypeError, r"rtol must be a number, got str"),
        ({"rtol": True}, TypeError, r"rtol must be a number, got bool"),
        ({"atol": -1.0}, ValueError, r"atol must be finite and not negative, got -1.0"),
        ({"atol": None}, TypeError, r"atol must be a number, got NoneType"),
        ({"max_iter": -1}, ValueError, r"max_iter must be at least 1, got -1"),
        ({"max_iter": 2**31}, ValueError, r"max_iter must be below 2\*\*31, got 2147483648"),
        ({"trace": "no"}, TypeError, "trace must be a bool, got str"),
        ({"throw": 1}, TypeError, "throw must be a bool, got int"),
        ({"progress": None}, TypeError, "progress must be a bool, got NoneType"),
        (
            {"compact": "all"},
            TypeError,
            "compact must be a bool or a tree of bools shaped like args, or .auto., got .all.",
        ),
        ({"max_iter": 2.5}, TypeError, r"max_iter must be an int, got float"),
        ({"max_iter": True}, TypeError, r"max_iter must be an int, got bool"),
        ({"max_iter": None}, TypeError, r"max_iter must be an int, got None"),
        ({"returns": "first"}, ValueError, r"returns must be one of 'best', 'last', 'image', 'next', got 'first'"),
        ({"solver": "newton"}, ValueError, r"solver must be one of 'anderson', 'broyden', 'picard', got 'newton'"),
        ({"solver": dq.Anderson}, TypeError, r"solver must be a name or an Anderson, Broyden or Picard"),
        ({"solver": None}, TypeError, r"solver must be a name or an Anderson, Broyden or Picard, got NoneType"),
        ({"args": torch.zeros(2)}, TypeError, r"args must be a tuple, got Tensor; write args=\(x,\)"),
        ({"args": [torch.zeros(2)]}, TypeError, r"args must be a tuple, got list"),
        ({"callback": 3}, TypeError, r"callback must be callable, got int"),
        ({"backend": "cuda"}, ValueError, r"backend must be one of 'auto', 'native', .* got 'cuda'"),
        ({"backend": "triton"}, ValueError, r"backend='triton' cannot serve device cpu: "),
        ({"tolerance": 1e-3}, TypeError, r"tolerance"),
        ({"m": 5}, TypeError, r"'m'"),
    ],
    ids=str,
)
def test_wrong_argument_raises_with_its_name(wrong, error, message):
    with pytest.raises(error, match=message):
        dq.fixed_point(never, Z, **wrong)


def test_map_that_is_no_callable_raises():
    with pytest.raises(TypeError, match=r"f must be callable, got Tensor"):
        dq.fixed_point(Z, Z)


def test_start_on_a_device_without_data_raises():
    with pytest.raises((TypeError, ValueError), match="meta"):
        dq.fixed_point(never, Z.to("meta"))


def test_wrong_backend_in_the_environment_raises_with_the_variable(monkeypatch):
    monkeypatch.setenv("DEQFAST_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"DEQFAST_BACKEND must be one of 'auto', .* got 'fast'"):
        dq.fixed_point(never, Z)
    monkeypatch.setenv("DEQFAST_BACKEND", "triton")
    with pytest.raises(ValueError, match=r"DEQFAST_BACKEND='triton' cannot serve device cpu: "):
        dq.fixed_point(never, Z)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_in_the_environment_serves_auto_alone(backend, monkeypatch):
    monkeypatch.setenv("DEQFAST_BACKEND", backend)
    assert solve(problem(2, 3)).backend == backend
    monkeypatch.setenv("DEQFAST_BACKEND", "nonsense")
    assert solve(problem(2, 3), backend=backend).backend == backend
    monkeypatch.delenv("DEQFAST_BACKEND")
    assert solve(problem(2, 3), backend=backend).backend == backend


WRONG_OUTPUT = [
    (lambda z: (z,), TypeError, r"f\(z\) must have the structure of z0, expected one tensor, got a tuple"),
    (lambda z: None, TypeError, r"f\(z\) must"),
    (lambda z: 1.0, TypeError, r"f\(z\) must"),
    (lambda z: z[:, :2], ValueError, r"f\(z\) must have the shape of z0, expected \(2, 3\), got \(2, 2\)"),
    (lambda z: z[0], ValueError, r"f\(z\) must have the shape of z0, expected \(2, 3\), got \(3,\)"),
    (lambda z: z.double(), TypeError, r"f\(z\) must have the dtype of z0, expected torch.float32, got torch.float64"),
    (
        lambda z: z.bfloat16(),
        TypeError,
        r"f\(z\) must have the dtype of z0, expected torch.float32, got torch.bfloat16",
    ),
    (lambda z: z.int(), TypeError, r"f\(z\) must have the dtype of z0, expected torch.float32, got torch.int32"),
    (lambda z: z + 0j, TypeError, r"f\(z\) must have the dtype of z0, expected torch.float32, got torch.complex64"),
    (lambda z: z.to("meta"), ValueError, r"f\(z\) must be on the device of z0, expected cpu, got meta"),
    (lambda z: z.to_sparse(), TypeError, r"f\(z\) must be a dense \(strided\) tensor"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("wrong", "error", "message"), WRONG_OUTPUT, ids=[str(i) for i in range(len(WRONG_OUTPUT))])
@pytest.mark.parametrize("call", [1, 3])
def test_wrong_output_of_f_raises_at_any_call(call, wrong, error, message, backend):
    calls = []

    def f(z):
        calls.append(1)
        return wrong(z) if len(calls) == call else 0.5 * z + 1

    with pytest.raises(error, match=message):
        dq.fixed_point(f, Z, rtol=0.0, backward="none", backend=backend)
    assert len(calls) == call


def test_wrong_tree_from_f_raises():
    z0 = {"a": Z, "b": Z}
    with pytest.raises(TypeError, match=r"f\(z\) must have the structure of z0, expected .*'a'.*'b'"):
        dq.fixed_point(lambda z: {"a": z["a"]}, z0, backward="none")
    with pytest.raises(TypeError, match=r"f\(z\) must have the structure of z0"):
        dq.fixed_point(lambda z: (z["a"], z["b"]), z0, backward="none")
    with pytest.raises(TypeError, match=r"f\(z\) must hold tensors, got a float"):
        dq.fixed_point(lambda z: {"a": 1.0, "b": z["b"]}, z0, backward="none")


@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), KeyboardInterrupt(), StopIteration("mine")])
def test_error_of_f_passes_through_untouched(error):
    calls = []

    def f(z):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return 0.5 * z + 1

    with pytest.raises(type(error)) as caught:
        dq.fixed_point(f, Z, rtol=0.0, backward="none")
    assert caught.value is error


EMULATED = native._C is not None and native.EMULATED


@pytest.mark.skipif(not EMULATED, reason="says what CUDA kernels refuse; make emulated runs it")
@pytest.mark.parametrize(
    ("solver", "z0", "message"),
    [
        (
            dq.Anderson(m=200),
            torch.zeros(1, 300),
            "m=200 is more than the CUDA kernels have room for; use backend='triton'",
        ),
        (dq.Broyden(memory=3000), torch.zeros(1, 70000), "memory=3000 is more than"),
        (dq.Picard(), [torch.zeros(1, 9)] * 17, "z0: the CUDA kernels take at most 16 tensors, got 17"),
    ],
)
def test_what_the_cuda_kernels_do_not_take_is_said_before_f_is_called(solver, z0, message):
    with pytest.raises(ValueError, match=message):
        dq.fixed_point(never, z0, solver=solver, backend="native", max_iter=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_root_takes_no_other_dtype_from_g(dtype):
    z0 = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"g\(z\) must have the dtype of z0, expected torch.float64"):
        dq.root(lambda z: (1 - 0.5 * z).to(dtype), z0)
