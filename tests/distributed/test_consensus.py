"""stop="consensus": ranks with samples of their own make as many evaluations as the slowest of them needs."""

from __future__ import annotations

import pytest
import torch
from ranks import all_well, run_ranks
from spread_maps import consensus_alone

import deqfast as dq


def case(solver, B=5, N=12, dtype=torch.float64, grad=False, **options):
    options = {"solver": solver, "rtol": 1e-9, "max_iter": 60, **options}
    return {"B": B, "N": N, "dtype": dtype, "grad": grad, "options": options}


CASES = {
    "anderson": case(dq.Anderson(), grad=True),
    "broyden": case(dq.Broyden(), grad=True),
    "picard": case(dq.Picard(), max_iter=200),
    "out of evaluations": case(dq.Anderson(), max_iter=6),
    "image": case(dq.Anderson(), returns="image"),
    "states": case(dq.Anderson(), states=[2, 5]),
    "torch": case(dq.Anderson(), backend="torch"),
    "float32": case(dq.Anderson(), dtype=torch.float32, rtol=1e-4),
}


@pytest.fixture(scope="module", params=[2, 3])
def found(request, tmp_path_factory):
    ranks = run_ranks(
        tmp_path_factory.mktemp("ranks"), "spread_maps:consensus", request.param, cases=list(CASES.values())
    )
    return dict(zip(CASES, zip(*all_well(ranks), strict=True), strict=True))


@pytest.mark.host
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_solve_of_all_samples_in_one_process(found, name):
    given, ranks = CASES[name], found[name]
    alone = consensus_alone(given)
    assert {r["evaluations"] for r in ranks} == {alone["evaluations"]}
    assert len({r["calls"] for r in ranks}) == 1
    loose = 1e5 * torch.finfo(given["dtype"]).eps
    for field in ("steps", "status"):
        assert torch.equal(torch.cat([r[field] for r in ranks]), alone[field]), field
    got = torch.cat([r["z"] for r in ranks])
    assert float((got - alone["z"]).norm()) <= loose * float(alone["z"].norm())
    if given["grad"]:
        for got, right in (
            (ranks[0]["W"], alone["W"]),
            (torch.cat([r["x"] for r in ranks]), alone["x"]),
        ):
            assert float((got - right).norm()) <= 100 * given["options"]["rtol"] * float(right.norm())
    for i, state in enumerate(alone["states"] or []):
        assert float((torch.cat([r["states"][i] for r in ranks]) - state).norm()) <= loose * float(state.norm())


def test_one_evaluation_is_in_vain_where_nobody_looks_between_them(found):
    for r in found["anderson"]:
        assert r["calls"] == r["evaluations"] + 1 + 1  # and one with a graph, for the gradient
    for r in found["image"]:
        assert r["calls"] == r["evaluations"] + 1
