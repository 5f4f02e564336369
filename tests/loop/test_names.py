"""Keywords that do not exist are refused with the one that was meant, whoever is called."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import re

import numpy as np
import pytest
import torch

import deqfast as dq

Z = torch.zeros(2, 3)


def never(*_):
    raise AssertionError("f was called before the names of the arguments were looked at")


CALLS = {
    "fixed_point": lambda **wrong: dq.fixed_point(never, Z, **wrong),
    "root": lambda **wrong: dq.root(never, Z, **wrong),
    "joint_solve": lambda **wrong: dq.joint_solve(never, never, Z, Z, **wrong),
}


@pytest.mark.parametrize("callee", CALLS)
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("tol", "'rtol'"),
        ("f_tol", "'rtol'"),
        ("eps", "'rtol'"),
        ("abs_tol", "'atol'"),
        ("threshold", "'max_iter'"),
        ("maxiter", "'max_iter'"),
        ("max_itr", "'max_iter'"),
        ("method", "'solver'"),
        ("lam", "solver=dq.Anderson(ridge=...)"),
        ("m", "solver=dq.Anderson(m=...)"),
        ("mixing", "solver=dq.Anderson(mixing=...)"),
        ("memory", "solver=dq.Broyden(memory=...)"),
    ],
)
def test_a_call_says_what_was_meant(name, meant, callee):
    message = f"{callee}() got an unexpected keyword argument {name!r}; did you mean {meant}?"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        CALLS[callee](**{name: 1})


def test_damping_is_where_it_is():
    with pytest.raises(TypeError, match=r"did you mean solver=dq.Anderson\(mixing=...\)\?$"):
        CALLS["fixed_point"](tau=0.5)
    with pytest.raises(TypeError, match=r"did you mean solver=dq.Picard\(damping=...\)\?$"):
        CALLS["fixed_point"](damping=0.5)
    with pytest.raises(TypeError, match="'tau'; did you mean 'damping'"):
        CALLS["joint_solve"](tau=0.5)


@pytest.mark.parametrize("callee", CALLS)
def test_a_name_like_no_other_is_told_all_of_them(callee):
    with pytest.raises(TypeError, match=rf"{callee}\(\) got an .* 'qqq'; it takes .*solver, rtol, atol, max_iter"):
        CALLS[callee](qqq=1)


@pytest.mark.parametrize(
    ("solver", "name", "meant"),
    [
        (dq.Anderson, "lam", "ridge"),
        (dq.Anderson, "beta", "mixing"),
        (dq.Anderson, "tau", "mixing"),
        (dq.Anderson, "window", "m"),
        (dq.Anderson, "histroy_dtype", "history_dtype"),
        (dq.Broyden, "history_size", "memory"),
        (dq.Broyden, "mem", "memory"),
        (dq.Picard, "tau", "damping"),
        (dq.Picard, "beta", "damping"),
        (dq.Implicit, "tol", "rtol"),
        (dq.Phantom, "tau", "damping"),
        (dq.Envelope, "maxiter", "max_iter"),
    ],
)
def test_options_say_what_was_meant(solver, name, meant):
    message = rf"^{solver.__name__}\(\) got an unexpected keyword argument {name!r}; did you mean {meant!r}\?$"
    with pytest.raises(TypeError, match=message):
        solver(**{name: 1})


@pytest.mark.parametrize("options", [dq.Anderson(m=3), dq.Broyden(memory=4), dq.Picard(damping=0.5), dq.Phantom()])
def test_options_are_dataclasses_as_before(options):
    assert copy.deepcopy(options) == options == pickle.loads(pickle.dumps(options)) == dataclasses.replace(options)
    names = [field.name for field in dataclasses.fields(options)]
    assert list(inspect.signature(type(options)).parameters) == names


@pytest.mark.parametrize("solver", [dq.Anderson, dq.Broyden, dq.Picard])
def test_every_option_of_a_solver_is_known_where_a_call_is_asked_for_it(solver):
    for field in dataclasses.fields(solver):
        with pytest.raises(TypeError, match=rf"did you mean solver=dq.{solver.__name__}\({field.name}=...\)\?$"):
            CALLS["fixed_point"](**{field.name: None})


def test_errors_of_f_are_its_own():
    def f(z):
        raise TypeError("f() got an unexpected keyword argument 'tol'")

    with pytest.raises(TypeError, match=r"^f\(\) got an unexpected keyword argument 'tol'$"):
        dq.fixed_point(f, Z)


@pytest.mark.parametrize(
    ("callee", "name", "meant"),
    [
        (CALLS["fixed_point"], "b_tol", "backward=dq.Implicit(rtol=...)"),
        (CALLS["fixed_point"], "b_max_iter", "backward=dq.Implicit(max_iter=...)"),
        (dq.Anderson, "history_size", "'m'"),
        (dq.Anderson, "M", "'m'"),
        (dq.Broyden, "max_rank", "'memory'"),
        (dq.Broyden, "LBFGS_thres", "'memory'"),
    ],
)
def test_names_of_others_lead_to_the_option_that_means_the_same(callee, name, meant):
    with pytest.raises(TypeError, match=re.escape(f"did you mean {meant}?")):
        callee(**{name: 5})


def test_numbers_of_numpy_are_numbers():
    sol = dq.fixed_point(
        lambda z: 0.5 * z + 1, Z, max_iter=np.int64(20), rtol=np.float32(1e-3), solver=dq.Anderson(m=np.int64(3))
    )
    assert sol.converged.all() and sol.nfe <= 20
    with pytest.raises(TypeError, match="max_iter must be an int"):
        dq.fixed_point(never, Z, max_iter=np.bool_(True))
