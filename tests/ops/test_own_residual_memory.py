"""The native kernel reads a residual of the caller's own within its memory, and refuses memory that does not fit."""

from __future__ import annotations

import pytest
import torch

import deqfast as dq
from deqfast.ops.native import extension as native
from deqfast.ops.native.plan import make_plan

pytestmark = pytest.mark.skipif(
    native._C is None or native.EMULATED, reason="it is of the host's kernels, in the extension"
)


@pytest.mark.sanitize
@pytest.mark.parametrize("M", [1, 7, 63, 1025, 4099])
@pytest.mark.parametrize("history", ["bfloat16", "float32", "int8"])
def test_odd_sizes(M, history):
    z0 = torch.zeros(3, 19)
    state = dq.Anderson(m=3, type=2, history_dtype=getattr(torch, history)).init(z0, rtol=1e-6, max_iter=8)
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(19, M, generator=generator)
    while not state.done:
        fz = 0.5 * torch.tanh(state.z) + 1
        state.step(fz, residual=(fz - state.z) @ A)
    assert state.backend == "native" and bool(state.z.isfinite().all())
    assert bool((state.residual < 1).all())


def test_memory_that_does_not_fit_is_refused():
    z0 = torch.zeros(3, 19)
    ws = dq.Anderson(m=3, type=2).init(z0).ws
    plan, _ = make_plan(ws)
    rows, columns = torch.zeros(3, 5), torch.zeros(3, 3, 5)
    plan.own(residual=native.array(rows), before=0, columns=native.array(columns))
    with pytest.raises(ValueError, match="own_columns: expected 180 bytes, got 144"):
        plan.own(residual=native.array(rows), before=0, columns=native.array(torch.zeros(3, 3, 4)))
    with pytest.raises(ValueError, match="own: expected 60 bytes, got 61"):
        plan.own(residual=(rows.data_ptr(), 61), before=0, columns=native.array(columns))
    for solver in (dq.Anderson(m=3), dq.Anderson(m=3, type=1), dq.Anderson(m=3, type=2, mixing=0.5)):
        other, _ = make_plan(solver.init(z0).ws)
        with pytest.raises(ValueError, match="own: expected Type II with mixing 1"):
            other.own(residual=native.array(rows), before=0, columns=native.array(columns))
    tiny, _ = make_plan(dq.Anderson(m=3, type=2).init(torch.zeros(3, 4)).ws)
    with pytest.raises(ValueError, match="kept products"):
        tiny.own(residual=native.array(rows), before=0, columns=native.array(columns))
