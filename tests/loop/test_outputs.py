"""The two ways of an output of f into a step: both accept the same outputs, to the same bits."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from problems import BACKENDS, DEVICE, same_bits

import deqfast as dq

SOLVERS = {
    "anderson": dq.Anderson(m=3),
    "type-2": dq.Anderson(m=2, type=2),
    "broyden": dq.Broyden(memory=4),
    "picard": dq.Picard(damping=0.8),
}
B, N = 3, 6


class Habits:
    """An f that returns its values in one of the ways that functions of users do."""

    def __init__(self):
        self.buffer = torch.empty(B, N, device=DEVICE)
        self.last = None

    def fresh(self, value, z):
        return value.clone()

    def same_buffer(self, value, z):
        return self.buffer.copy_(value)

    def part_of_a_buffer(self, value, z):
        self.wide = torch.cat([value, value], dim=1)
        return self.wide[:, :N]

    def transposed(self, value, z):
        return value.T.contiguous().T

    def negative_view(self, value, z):
        return torch._neg_view(-value)

    def with_graph(self, value, z):
        return value.clone().requires_grad_()

    def iterate_itself(self, value, z):
        return z

    def written_later(self, value, z):
        """The output of the evaluation before is overwritten by this one."""
        if self.last is not None:
            self.last.fill_(7.0)
        self.last = value.clone()
        return self.last

    def made_for_inference(self, value, z):
        with torch.inference_mode():
            return value.clone()


HABITS = [name for name in vars(Habits) if not name.startswith("_")]


def steps(state, habits, plain):
    """Iterates of a solve whose f has these habits; ``plain``: whether the quick way may be taken."""
    f, found, quick = Habits(), [], 0
    a = torch.linspace(0.1, 0.8, N, device=DEVICE)
    for name in habits:
        z = state.z
        value = a * z.detach() + 1
        if not plain:
            state._outputs.plain = False
        quick += state._outputs.plain
        state.step(getattr(f, name)(value, z))
        found.append(state.z.clone())
    return found, quick


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@settings(max_examples=40)
@given(habits=st.lists(st.sampled_from(HABITS), min_size=2, max_size=8))
def test_the_quick_way_takes_what_the_careful_one_takes_to_the_same_bits(backend, solver, habits):
    z0 = torch.linspace(-1, 1, B * N, device=DEVICE).view(B, N)
    options = {"rtol": 0.0, "backend": backend}
    states = [solver.init(z0, **options), solver.init(z0, **options)]
    with torch.no_grad():
        (quick, _), (careful, _) = (steps(s, habits, plain) for s, plain in zip(states, (True, False), strict=True))
    assert all(same_bits(a, b) for a, b in zip(quick, careful, strict=True))
    for name in ("status", "steps", "residual"):
        assert same_bits(getattr(states[0], name), getattr(states[1], name)), name
    assert states[0].state_dict()["copies_f"] == states[1].state_dict()["copies_f"]


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_an_f_without_habits_takes_the_quick_way_from_its_third_evaluation_on(solver):
    state = solver.init(torch.zeros(B, N, device=DEVICE), rtol=0.0)
    if state.bound.quick is None:
        pytest.skip(f"backend {state.backend} has no quick way")
    with torch.no_grad():
        _, quick = steps(state, ["fresh"] * 8, plain=True)
    assert quick >= 6


def test_f_may_return_a_list_for_a_tuple():
    z0 = (torch.zeros(3, 2), [torch.zeros(3, 4)])
    sol = dq.fixed_point(lambda z: [0.5 * z[0] + 1, (0.5 * z[1][0] + 1,)], z0)
    assert isinstance(sol.z, tuple) and isinstance(sol.z[1], list)
    assert torch.allclose(sol.z[1][0], torch.full((3, 4), 2.0), rtol=1e-3)
    with pytest.raises(TypeError, match="structure of z0"):
        dq.fixed_point(lambda z: [z[0], {"a": z[1][0]}], z0)
