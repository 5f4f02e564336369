"""What the bindings refuse: memory under another's name, groups of numbers with other fields."""

from typing import NamedTuple

import pytest
import torch

import deqfast as dq
from deqfast.ops.native import extension, plan

pytestmark = pytest.mark.skipif(extension._C is None, reason="the extension is not built")

SOLVERS = [dq.Anderson(m=3), dq.Anderson(m=3, type=2, history_dtype=torch.int8), dq.Broyden(memory=4)]


def workspace(solver):
    return solver.init(torch.zeros(5, 40)).ws


@pytest.mark.parametrize("solver", SOLVERS, ids=["mixed", "type-2", "broyden"])
def test_arrays_that_change_places_are_refused_by_name(solver):
    names = workspace(solver).kept
    for one in names:
        for other in names:
            ws = workspace(solver)
            a, b = getattr(ws, one), getattr(ws, other)
            if a.nbytes == b.nbytes:
                continue
            setattr(ws, one, torch.empty(b.nbytes // a.itemsize, dtype=a.dtype))
            expected = a.nbytes or r"\d+"  # what may be left out is asked for in full once something is there
            with pytest.raises(ValueError, match=rf"{one}: expected {expected} bytes, got {b.nbytes}"):
                plan.make_plan(ws)


@pytest.mark.parametrize("name", ["ints", "reals"])
def test_statistics_of_another_size_are_refused_by_name(name):
    ws = workspace(SOLVERS[0])
    setattr(ws, name, getattr(ws, name)[:-1].clone())
    with pytest.raises(ValueError, match=f"{name}: expected"):
        plan.make_plan(ws)


def test_an_iterate_of_another_size_is_refused():
    ws = workspace(SOLVERS[0])
    ws.saved = [torch.zeros(5, 41)]
    with pytest.raises(ValueError, match="saved: expected 800 bytes, got 820"):
        plan.make_plan(ws)


def test_addresses_are_not_taken_by_position():
    with pytest.raises(TypeError, match="incompatible constructor arguments"):
        extension._C.BroydenPlan(5, extension.CODES[torch.float32], [40], [(0, 800)], [(0, 800)], [(0, 800)])


class Fewer(NamedTuple):
    memory: int = 4


class Other(NamedTuple):
    memory: int = 4
    scale_last: bool = False


class More(NamedTuple):
    memory: int = 4
    scale_first: bool = False
    another: int = 0


@pytest.mark.parametrize("group", [Fewer(), Other(), More()])
def test_numbers_of_a_method_have_the_names_that_cpp_knows(group):
    ws = workspace(SOLVERS[2])
    ws.method = group
    with pytest.raises(
        ValueError, match=rf"method: expected the fields memory, scale_first, got .*{group._fields[-1]}"
    ):
        plan.make_plan(ws)
