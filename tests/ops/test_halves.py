"""A native step run as its two halves, reduce and apply, is the step."""

import pytest
import torch

import deqfast as dq
from deqfast.ops import native

pytestmark = pytest.mark.skipif(native._C is None, reason="the extension is not built")

SIZES = {"anderson": [(3, 40), (17, 33), (2, 5000)], "broyden": [(2, 70000)]}


def in_halves(state):
    plan, state.memory = native._plan(state.ws, halves=True)

    def update(*sources):
        native._general_step(plan, state.ws, *sources, native._C.REDUCE)
        return native._general_step(plan, state.ws, *sources, native._C.APPLY)

    state._update, state._dense = update, None
    return state


@pytest.mark.parametrize("solver", [dq.Anderson(m=3), dq.Anderson(m=3, type=2), dq.Broyden(memory=4)])
def test_reduce_then_apply_is_step(solver):
    for B, N in SIZES["broyden" if isinstance(solver, dq.Broyden) else "anderson"]:
        a = 0.9 * torch.rand(B, N)
        whole, halves = solver.init(torch.zeros(B, N), rtol=1e-5), in_halves(solver.init(torch.zeros(B, N), rtol=1e-5))
        while whole.nfe < 12 and not whole.done:
            done = [state.step(a * state.z + 1) for state in (whole, halves)]
            assert done[0] == done[1]
            assert torch.equal(whole.z, halves.z)
        assert torch.equal(whole.ws.ints, halves.ws.ints)


@pytest.mark.parametrize(("solver", "N"), [(dq.Anderson(m=3), 4), (dq.Broyden(), 40)])
def test_what_keeps_nothing_between_the_halves_says_so(solver, N):
    state = in_halves(solver.init(torch.zeros(2, N)))
    with pytest.raises(ValueError, match="whole steps only"):
        state.step(torch.ones(2, N))
    assert state.nfe == 0
