"""States of DTensors: a placement says what is spread, and what comes back is placed alike."""

from __future__ import annotations

import pytest
import torch
from ranks import all_well, run_ranks
from spread_maps import problem

import deqfast as dq
from deqfast.ops.native import extension as native

pytestmark = pytest.mark.skipif(native._C is None or native.EMULATED, reason="the extension is not built")


@pytest.fixture(scope="module", params=[2, 3])
def found(request, tmp_path_factory):
    return all_well(run_ranks(tmp_path_factory.mktemp("ranks"), "spread_maps:meshed", request.param))


@pytest.mark.parametrize("placement", ["batch", "numbers", "replicated"])
def test_it_is_the_solve_of_the_whole_tensor(found, placement):
    W, x = problem(5, 13, torch.float64)
    W.requires_grad_()
    x.requires_grad_()
    alone = dq.fixed_point(lambda z, W, x: torch.tanh(z @ W + x), torch.zeros(5, 13).double(), (W, x), rtol=1e-10)
    alone.z.square().sum().backward()
    for ranks, _ in found:
        got = ranks[placement]
        assert got["is"]
        assert torch.allclose(got["z"], alone.z, rtol=1e-8, atol=1e-10)
        assert torch.allclose(got["W"], W.grad, rtol=1e-7, atol=1e-8)
        assert torch.allclose(got["x"], x.grad, rtol=1e-7, atol=1e-8)
        assert got["evaluations"] <= alone.evaluations  # of a shard of the batch its own samples decide
    if placement != "batch":
        assert {ranks[placement]["evaluations"] for ranks, _ in found} == {alone.evaluations}


def test_what_cannot_be_is_said(found):
    for _, told in found:
        assert "z0 must be sharded or replicated, got P" in told[0]
        assert told[1] == "z0 must hold tensors of a mesh alone, or none, got a Tensor beside one"
        assert told[2] == "tensors of z0 must be of one mesh, got several"
        assert told[3] == "group is told by the mesh of z0 and its placements: leave it out"
        assert told[4] == 'z0 spreads samples over ranks, which stop together anyway: leave out stop="consensus"'
