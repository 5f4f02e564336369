"""Joint solves of samples that are spread over ranks are those of one process: to rounding, with gradients."""

from __future__ import annotations

import pytest
import torch
from joint_ranks import half, schedule, seventh, whole
from ranks import all_well, run_ranks

import deqfast as dq
from deqfast.ops.native import extension as native
from deqfast.project import Box, L2Ball, LinfBall

pytestmark = [
    pytest.mark.skipif(native._C is None or native.EMULATED, reason="it is of the host's kernels, in the extension"),
    pytest.mark.host,
]

BLOCKS = ("z", "mu", "x")


def case(dtype=torch.float64, B=3, N=20, n=7, grad=False, coupled=False, **options):
    options = {"step_size": 0.1, "rtol": 1e-8, "max_iter": 60, **options}
    if not n:
        del options["step_size"]
    return {"dtype": dtype, "B": B, "N": N, "n": n, "grad": grad, "coupled": coupled, "options": options}


CASES = {
    "anderson": case(grad=True, trace=True),
    "picard": case(solver="picard", step_size=0.1, rtol=1e-5, max_iter=100, grad=True),
    "type 2, few columns": case(solver=dq.Anderson(m=5, type=2), rtol=1e-6),
    "float32": case(dtype=torch.float32, rtol=0.0, max_iter=10, backward=dq.Envelope(max_iter=60), grad=True),
    "bfloat16 history": case(
        solver=dq.Anderson(m=5, history_dtype=torch.bfloat16), dtype=torch.float32, rtol=0.0, max_iter=10
    ),
    "x by plain steps": case(accelerate=("z", "mu"), step_size=0.1, rtol=1e-4),
    "normalised": case(normalize=True, accelerate=("z", "mu"), step_size=schedule, max_iter=20),
    "no input": case(n=0, grad=True),
    "box": case(project=Box(-0.5, 0.5), rtol=1e-5),
    "largest-entry ball": case(project=LinfBall(0.4), rtol=1e-5),
    "ball": case(project=L2Ball(0.8), rtol=1e-5, grad=True),
    "ball around a centre": case(project=0.6, center=0.1, rtol=1e-4),
    "normalised in a ball": case(
        project=L2Ball(0.8), normalize=True, accelerate=("z", "mu"), step_size=schedule, max_iter=20
    ),
    "a projection of one's own": case(project=half, rtol=1e-5),
    "steps of every number": case(step_size="tensors"),
    "a schedule": case(step_size=schedule, rtol=1e-5),
    "last": case(returns="last", max_iter=9),
    "least cost": case(returns="cost", max_iter=9),
    "safeguard": case(safeguard=True),
    "all together": case(stop="all"),
    "all together, few evaluations": case(stop="all", max_iter=5),
    "the whole state": case(batch_dims=0),
    "coupled": case(coupled=True, rtol=1e-5),
    "stopped by a callback": case(callback=seventh, rtol=1e-2),
    "implicit": case(backward="implicit", grad=True, N=8, n=4),
}


@pytest.fixture(scope="module", params=[2, 3])
def found(request, tmp_path_factory):
    ranks = run_ranks(tmp_path_factory.mktemp("ranks"), "joint_ranks:spread", request.param, cases=list(CASES.values()))
    return dict(zip(CASES, zip(*all_well(ranks), strict=True), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_solve_of_one_process(found, name):
    given, ranks = CASES[name], found[name]
    alone = whole(given)
    kept = given["options"].get("solver")
    narrow = isinstance(kept, dq.Anderson) and kept.history_dtype is torch.bfloat16
    eps = 1e-5 if narrow else torch.finfo(given["dtype"]).eps  # a last place may tip the rounding of a column
    for r in ranks:
        assert r["nfe"] == alone["nfe"]
        for field in ("steps", "status"):
            assert torch.equal(r[field], alone[field]), field
        for field, right in alone["residual"].items():
            assert torch.equal(r["residual"][field], ranks[0]["residual"][field])  # the same bits on all ranks
            assert torch.allclose(r["residual"][field], right, rtol=1e-2, atol=1e4 * eps)
        assert torch.equal(r["cost"], ranks[0]["cost"])
        assert torch.allclose(r["cost"], alone["cost"], rtol=1e4 * eps)
    for field in BLOCKS:
        got, right = torch.cat([r[field] for r in ranks], dim=1), alone[field]
        assert float((got - right).norm()) <= 1e4 * eps * max(1, float(right.norm())), field
    if given["grad"]:
        for field in {"W", "U", "b"} & set(alone):
            got, right = torch.cat([r[field] for r in ranks], dim=1), alone[field]
            assert float((got - right).norm()) <= 1e5 * eps * float(right.norm()), field
    if alone["trace"] is not None:
        for block, rows in alone["trace"].items():
            assert torch.allclose(ranks[0]["trace"][block], rows, rtol=1e-2, atol=1e-9, equal_nan=True)
