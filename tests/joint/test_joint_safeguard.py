"""A safeguarded joint solve restarts a sample whose residual grows, and goes on being accelerated."""

import torch
from quadratics import quadratic

import deqfast as dq


def test_safeguard_does_not_keep_a_climbing_map_from_its_optimum():
    f, loss, z0, x0, _, _ = quadratic(B=4, N=24, n=12, seed=1)
    step = 2 * dq.joint_step_size(f, loss, z0, x0)  # plain steps climb
    options = {"step_size": step, "max_iter": 300, "rtol": 1e-8, "trace": True}
    free = dq.joint_solve(f, loss, z0, x0, **options)
    guarded = dq.joint_solve(f, loss, z0, x0, safeguard=True, **options)
    assert free.converged.all() and guarded.converged.all()
    torch.testing.assert_close(guarded.cost, free.cost, rtol=1e-6, atol=0)
    # It does something: the solves part where the first sample's residual has grown.
    shorter = min(free.nfe, guarded.nfe)
    assert not torch.equal(free.trace["x"][:shorter].nan_to_num(), guarded.trace["x"][:shorter].nan_to_num())
    assert torch.equal(free.trace["x"][:2], guarded.trace["x"][:2])
