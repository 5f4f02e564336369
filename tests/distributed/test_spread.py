"""Samples that are spread over ranks are solved as on one: to rounding, in as many evaluations, with gradients."""

from __future__ import annotations

import pytest
import torch
from ranks import all_well, run_ranks
from spread_maps import whole

import deqfast as dq
from deqfast.ops.native import extension as native

pytestmark = [
    pytest.mark.skipif(native._C is None or native.EMULATED, reason="it is of the host's kernels, in the extension"),
    pytest.mark.host,
]


def case(solver, kind="tanh", B=3, N=40, dtype=torch.float64, grad=False, **options):
    options = {"solver": solver, "rtol": 1e-9, "max_iter": 60, **options}
    return {"kind": kind, "B": B, "N": N, "dtype": dtype, "grad": grad, "options": options}


CASES = {
    "anderson": case(dq.Anderson(), grad=True),
    "type 2": case(dq.Anderson(type=2), grad=True),
    "type 1, few columns": case(dq.Anderson(type=1, m=3)),
    "mixing": case(dq.Anderson(m=3, mixing=0.7)),
    "mixes now and then": case(dq.Anderson(mix_every=2)),
    "oldest first": case(dq.Anderson(m=3, evict="oldest")),
    "broyden": case(dq.Broyden(), grad=True),
    "broyden, few steps": case(dq.Broyden(memory=4)),
    "picard": case(dq.Picard(), grad=True, max_iter=200),
    "float32": case(dq.Anderson(), dtype=torch.float32, rtol=1e-5, grad=True),
    "bfloat16 history": case(dq.Anderson(history_dtype=torch.bfloat16), dtype=torch.float32, rtol=1e-5),
    "int8 history": case(dq.Anderson(history_dtype=torch.int8), dtype=torch.float32, rtol=1e-4),
    "a few numbers": case(dq.Anderson(m=2), N=5),
    "many chunks": case(dq.Anderson(), N=30000, B=1, kind="tanh", rtol=1e-9) | {"N": 900},
    "another magnitude": case(dq.Anderson(), kind="affine"),
    "another magnitude, broyden": case(dq.Broyden(), kind="affine"),
    "all together": case(dq.Anderson(), stop="all"),
    "the whole state": case(dq.Anderson(), batch_dims=0),
    "image": case(dq.Anderson(), returns="image", max_iter=5),
    "next": case(dq.Anderson(), returns="next", max_iter=5),
    "last": case(dq.Broyden(), returns="last", max_iter=5),
    "states": case(dq.Anderson(), states=[1, 4], trace=True),
    "coupled": case(dq.Anderson(), kind="coupled", rtol=1e-6, max_iter=200),
    "coupled, broyden": case(dq.Broyden(), kind="coupled", rtol=1e-6, max_iter=200),
}
# What overflows: where it ends depends on rounding, that the ranks agree does not.
ROUGH = {
    "a mix overflows": case(dq.Anderson(m=3), kind="steep", dtype=torch.float32, rtol=1e-6, max_iter=20),
    "a step overflows": case(dq.Broyden(), kind="steep", dtype=torch.float32, rtol=1e-6, max_iter=20),
}


@pytest.fixture(scope="module", params=[2, 3])
def found(request, tmp_path_factory):
    given = {**CASES, **ROUGH}
    ranks = run_ranks(tmp_path_factory.mktemp("ranks"), "spread_maps:spread", request.param, cases=list(given.values()))
    return dict(zip(given, zip(*all_well(ranks), strict=True), strict=True))


def columns(ranks, name):
    return torch.cat([r[name] for r in ranks], dim=1)


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_solve_of_one_process(found, name):
    given, ranks = CASES[name], found[name]
    alone = whole(given)
    for r in ranks:
        assert r["evaluations"] == alone["evaluations"]
        for field in ("steps", "status"):
            assert torch.equal(r[field], alone[field]), field
        assert torch.equal(r["residual"], ranks[0]["residual"])  # the same bits on all ranks
        assert {k: v.tolist() for k, v in r["events"].items()} == {k: v.tolist() for k, v in alone["events"].items()}
    eps = torch.finfo(given["dtype"]).eps
    scale = 1e5 * eps * float(alone["z"].norm())
    assert float((columns(ranks, "z") - alone["z"]).norm()) <= scale
    if given["grad"]:
        for field in ("W", "x"):
            got, right = columns(ranks, field), alone[field]
            assert float((got - right).norm()) <= 1e6 * eps * float(right.norm())
        assert len({r["backward"] for r in ranks}) == 1
    for i, state in enumerate(alone["states"] or []):
        assert float((torch.cat([r["states"][i] for r in ranks], dim=1) - state).norm()) <= scale
    if alone["trace"] is not None:
        assert torch.allclose(ranks[0]["trace"], alone["trace"], rtol=1e-3, equal_nan=True)


@pytest.mark.parametrize("name", ROUGH)
def test_ranks_agree_where_one_of_them_overflows(found, name):
    ranks = found[name]
    for r in ranks[1:]:
        assert torch.equal(r["status"], ranks[0]["status"]) and torch.equal(r["steps"], ranks[0]["steps"])
        assert {k: v.tolist() for k, v in r["events"].items()} == {k: v.tolist() for k, v in ranks[0]["events"].items()}
