"""Joint solves name the argument that is wrong, before any work."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from quadratics import F64
from torch import Tensor

import deqfast as dq
from deqfast.joint.problem import Problem
from deqfast.ops.lag import Later

Z0, X0 = torch.zeros(2, 3), torch.zeros(2, 3)


class OnMesh(Tensor):
    """What a DTensor is known by."""

    placements, device_mesh = (), None

    def to_local(self) -> Tensor:
        return self.as_subclass(Tensor)


def good_f(z: Any, x: Any) -> Any:
    return 0.5 * z + x


def good_loss(z: Any, x: Any) -> Tensor:
    return (z - 1).square().sum(1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"f": 1}, TypeError, "f must be callable, got int"),
        ({"loss": None}, TypeError, "loss must be callable, got NoneType"),
        (
            {"loss": lambda z, x: z.square().mean()},
            ValueError,
            "must return one number a sample",
        ),
        ({"loss": lambda z, x: torch.ones(2)}, ValueError, "must depend on z or x"),
        ({"f": lambda z, x: 0.5 * z + x.detach()}, ValueError, r"f\(z, x\) must be differentiable in x"),
        ({"f": lambda z, x: z[:, :2]}, ValueError, r"f\(z, x\) must have the shape of z0"),
        ({"step_size": 0.0}, ValueError, "step_size must be positive and finite, got 0.0"),
        ({"step_size": -1}, ValueError, "step_size must be positive and finite, got -1"),
        ({"step_size": None}, TypeError, "step_size must be a number"),
        ({"step_size": lambda k: 0.0}, ValueError, r"step_size\(k\) must be positive"),
        ({"step_size": torch.zeros(3)}, ValueError, "step_size must be positive"),
        ({"step_size": torch.full((3,), math.inf)}, ValueError, "step_size must be positive and finite"),
        ({"step_size": torch.ones(4)}, ValueError, r"step_size must broadcast to x0, expected \(2, 3\), got \(4,\)"),
        ({"step_size": [1.0]}, TypeError, "step_size must be a number, a function of the step or tensors like x0"),
        (
            {"x0": X0.as_subclass(OnMesh)},
            TypeError,
            r"x0 must hold plain tensors, got some of a mesh: give to_local\(\)",
        ),
        ({"z0": Z0.as_subclass(OnMesh)}, TypeError, "z0 must hold plain tensors, got some of a mesh"),
        ({"damping": 0.0}, ValueError, r"damping must be in \(0, 1\], got 0.0"),
        ({"damping": (0.5, 0.5, 0.5)}, ValueError, "damping must be a number or two"),
        ({"project": 3}, TypeError, "project must be a set such as Box.*got int"),
        ({"project": dq.project.Box(1.0, 2.0)}, ValueError, "x0 must lie within the projection"),
        ({"project": lambda x: x[:, :2]}, ValueError, r"project\(x\) must have the shape of x0"),
        (
            {"project": dq.project.L2Ball(1.0, torch.zeros(2, 4))},
            ValueError,
            "project.center must have the shape of x0",
        ),
        ({"accelerate": ("w",)}, ValueError, "accelerate must name blocks of"),
        ({"accelerate": ()}, ValueError, "accelerate must name a block"),
        ({"accelerate": ("z",), "solver": dq.Anderson(mixing=0.5)}, ValueError, "needs mixing=1"),
        ({"solver": "broyden"}, ValueError, "a joint solve has no Broyden step"),
        ({"rtol": {"w": 1.0}}, ValueError, "rtol must name blocks of"),
        ({"rtol": (1e-3, 1e-3)}, ValueError, "rtol must have a number for each of"),
        ({"atol": -1.0}, ValueError, "atol must be finite and not negative"),
        ({"max_iter": 0}, ValueError, "max_iter must be at least 1"),
        ({"returns": "first"}, ValueError, "returns must be one of"),
        ({"backward": "unroll"}, ValueError, "backward must be 'envelope', 'implicit', 'none', an Envelope or an Impl"),
        ({"backward": dq.Envelope}, ValueError, "backward must be 'envelope'"),
        ({"x0": torch.zeros(3, 3)}, ValueError, "x0 must have the batch of z0, expected 2, got 3"),
        ({"x0": torch.zeros(2, 3, dtype=F64)}, ValueError, "x0 must have the precision of z0"),
        ({"mu0": torch.zeros(2, 4)}, ValueError, "mu0 must have the shape of z0"),
        ({"args": [1]}, TypeError, "args must be a tuple"),
        ({"safeguard": 1}, TypeError, "safeguard must be a bool"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
        ({"x0": (), "step_size": None, "project": lambda x: x}, ValueError, "project needs an x0"),
        ({"x0": ()}, ValueError, "step_size needs an x0 to step"),
        ({"x0": (), "step_size": None, "normalize": True}, ValueError, "normalize needs an x0 to step"),
        ({"project": dq.project.Box}, TypeError, "project must be a set such as Box.*got Box"),
        ({"accelerate": 1}, TypeError, "accelerate must be a name or some of .*, got int"),
        ({"step_size": torch.ones(3, dtype=torch.complex64)}, TypeError, "step_size must hold real numbers, got"),
        ({"step_size": torch.ones(3, dtype=torch.bool)}, TypeError, "step_size must hold real numbers, got"),
        ({"step_size": torch.ones(3, device="meta")}, ValueError, "step_size must be on the device of x0"),
    ],
)
def test_wrong_calls_name_the_argument(changes, error, message):
    call = {"f": good_f, "loss": good_loss, "z0": Z0, "x0": X0, "step_size": 0.1, **changes}
    with pytest.raises(error, match=message):
        dq.joint_solve(call.pop("f"), call.pop("loss"), call.pop("z0"), call.pop("x0"), **call)


@pytest.mark.parametrize("max_iter", [1, 50])
def test_values_on_a_gpu_are_refused_when_the_host_hears_of_them(monkeypatch, max_iter):
    monkeypatch.setattr(Problem, "_refuse_where", lambda self, bad, message: self._late.append((Later(bad), message)))
    calls = []

    def f(z: Any, x: Any) -> Any:
        calls.append(1)
        return good_f(z, x)

    bad = {"x0 must lie within": {"project": dq.project.Box(1.0, 2.0)}, "step_size must be positive": {}}
    for message, changes in bad.items():
        calls.clear()
        options = {"step_size": torch.zeros(3) if not changes else 0.1, "max_iter": max_iter, **changes}
        with pytest.raises(ValueError, match=message):
            dq.joint_solve(f, good_loss, Z0, X0, **options)
        assert len(calls) <= 3
        with pytest.raises(ValueError, match=message):  # stopped before the host has heard
            dq.joint_solve(f, good_loss, Z0, X0, callback=lambda k, state: True, **options)
    both = {"project": dq.project.Box(1.0, 2.0), "step_size": torch.zeros(3)}
    with pytest.raises(ValueError, match="step_size must be positive"):  # the first, as on a CPU
        dq.joint_solve(f, good_loss, Z0, X0, **both)
    assert dq.joint_solve(f, good_loss, Z0, X0, step_size=torch.full((3,), 0.1), max_iter=5).nfe == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dq.project.Box(1.0, 1.0), "low must be below high"),
        (lambda: dq.project.L2Ball(0.0), "radius must be positive"),
        (lambda: dq.project.LinfBall(math.inf), "radius must be positive and finite"),
        (lambda: dq.project.LinfBall(1.0, low=2.0, high=1.0), "low must be below high"),
    ],
)
def test_wrong_sets_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
