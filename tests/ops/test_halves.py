"""A native step run as its two halves, reduce and apply, is the step."""

import pytest
import torch

import deqfast as dq
from deqfast.ops import contract
from deqfast.ops.native import extension as native
from deqfast.ops.native import plan as plan_module

pytestmark = pytest.mark.skipif(native._C is None, reason="the extension is not built")

SIZES = {"anderson": [(3, 40), (17, 33), (2, 5000)], "broyden": [(2, 70000)]}


class Halves(contract.BoundStep):
    """A native step as its two halves, one after the other."""

    counts_writes = False

    def __init__(self, ws):
        super().__init__(ws)
        self.plan, self.memory = plan_module.make_plan(ws, halves=True)

    def __call__(self, f, f_prev, f_rows, f_prev_rows):
        sources = (f, f_prev, f_rows, f_prev_rows)
        plan_module.general_step(self.plan, self.ws, *sources, phase=native._C.REDUCE)
        return plan_module.general_step(self.plan, self.ws, *sources, phase=native._C.APPLY)


def in_halves(state):
    state._outputs.bind(Halves(state.ws))
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
