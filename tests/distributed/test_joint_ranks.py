"""Joint solves of ranks that stop together, and what ranks are told that were given what does not fit together."""

from __future__ import annotations

import re

import pytest
import torch
from joint_ranks import consensus_alone
from ranks import all_well, run_ranks

import deqfast as dq
from deqfast.ops.native import extension as native
from deqfast.project import Box, L2Ball, LinfBall

pytestmark = [
    pytest.mark.skipif(native._C is None or native.EMULATED, reason="it is of the host's kernels, in the extension"),
    pytest.mark.host,
]


def case(B=4, **options):
    options = {
        "step_size": 0.05,
        "rtol": 1e-6,
        "max_iter": 120,
        "backward": dq.Envelope(rtol=1e-10, max_iter=100),
        **options,
    }
    return {"dtype": torch.float64, "B": B, "N": 8, "n": 4, "options": options}


CONSENSUS = {
    "anderson": case(solver=dq.Anderson(m=2), step_size=0.1, rtol=1e-3),
    "picard": case(solver="picard", rtol=1e-3, max_iter=200),
    "few evaluations": case(max_iter=7, rtol=1e-12),
    "in a ball": case(solver="picard", project=L2Ball(0.8), rtol=1e-3, max_iter=200),
}


@pytest.fixture(scope="module", params=[2, 3])
def together(request, tmp_path_factory):
    given = list(CONSENSUS.values())
    ranks = run_ranks(tmp_path_factory.mktemp("ranks"), "joint_ranks:consensus", request.param, cases=given)
    return dict(zip(CONSENSUS, zip(*all_well(ranks), strict=True), strict=True))


@pytest.mark.parametrize("name", CONSENSUS)
def test_samples_of_all_ranks_stop_together(together, name):
    ranks, alone = together[name], consensus_alone(CONSENSUS[name])
    assert len({r["calls"] for r in ranks}) == len({r["made"] for r in ranks}) == 1  # or one had waited for ever
    for r in ranks:
        assert r["nfe"] == alone["nfe"]
        assert name == "few evaluations" or set(r["status"].tolist()) <= {dq.Status.CONVERGED}
    for field in ("z", "mu", "x", "cost", "status", "steps"):
        assert torch.allclose(torch.cat([r[field] for r in ranks]), alone[field], rtol=1e-9, atol=1e-11), field
    for field in ("W", "U"):
        assert torch.allclose(ranks[0][field], alone[field], rtol=1e-6, atol=1e-9), field


# A case: what each rank is given, the kinds of error, the words.
WRONG = {
    "samples": ([{}, {"shape": (3, 3)}], "RankError|ValueError", "x0 must have the batch of z0, expected 3, got 2"),
    "rtol": ([{"rtol": 1e-4}, {"rtol": 1e-6}], "RankError", r"agree on rtol, got rank 0: \[0.0001, 0.0001, 0.0001\]"),
    "step_size": ([{}, {"step_size": 0.2}], "RankError", "agree on step_size, got rank 0: 0.1; rank 1: 0.2"),
    "damping": ([{}, {"damping": 0.5}], "RankError", "agree on damping"),
    "project": ([{}, {"project": LinfBall(2.0)}], "RankError", "agree on project.*rank 0: nothing; rank 1: ball linf"),
    "returns": ([{}, {"returns": "cost"}], "RankError", "agree on returns"),
    "backend": ([{}, {"backend": "torch"}], "RankError", "agree on backend"),
    "one option is wrong": ([{}, {"damping": 2.0}], "RankError|ValueError", "damping must be .*got 2.0"),
    "one gradient is wrong": ([{}, {"backward": "all"}], "RankError|ValueError", "backward must be 'envelope'"),
    "one start is outside": (
        [{"project": LinfBall(1.0)}, {"project": LinfBall(1.0), "at": 2.0}],
        "RankError|ValueError",
        "x0 must lie within the projection",
    ),
    "outside together": (
        [{"project": L2Ball(2.0), "at": 1.0}],  # each part of the sample would be inside
        "ValueError",
        "x0 must lie within the projection",
    ),
    "f's shape": ([{}, {"kind": "shape"}], "RankError|ValueError", r"f\(z, x\) must have the shape of z0"),
    "loss's shape": ([{}, {"kind": "mean"}], "RankError|ValueError", "loss.* must return one number a sample"),
    "no rank has a cost": ([{"kind": "constant"}], "ValueError", "depend on z or x, got one that depends on neither"),
    "one rank has no cost": ([{}, {"kind": "constant"}], "nothing", ""),
    "one rank has none of x": ([{}, {"kind": "no x"}], "nothing", ""),
    "consensus, one without x": (
        [{"stop": "consensus"}, {"stop": "consensus", "kind": "no x"}],
        "ValueError",
        "must be differentiable in x",
    ),
    "consensus, rtol": ([{"stop": "consensus"}, {"stop": "consensus", "rtol": 0.1}], "RankError", "agree on rtol"),
    "torch": ([{"backend": "torch"}], "ValueError", "group needs a backend whose steps can be spread over ranks"),
    "segments": ([{"segments": torch.tensor([0, 0])}], "ValueError", "group does not go together with segments"),
    "implicit in a ball": (
        [{"backward": "implicit", "project": L2Ball(2.0)}],
        "ValueError",
        "group does not go together with backward='implicit' and an L2Ball",
    ),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    cases = [given for given, _, _ in WRONG.values()]
    ranks = all_well(run_ranks(tmp_path_factory.mktemp("ranks"), "joint_ranks:wrong", 2, cases=cases))
    return dict(zip(WRONG, zip(*ranks, strict=True), strict=True))


@pytest.mark.parametrize("name", WRONG)
def test_every_rank_says_what_is_wrong(told, name):
    _, kinds, words = WRONG[name]
    assert {kind for kind, _ in told[name]} <= set(kinds.split("|")), told[name]
    for _, said in told[name]:
        assert re.search(words, said), told[name]


def test_nan_on_one_rank_stops_its_sample_on_all(tmp_path):
    for status, cost in all_well(run_ranks(tmp_path, "joint_ranks:nan_on_one", 2)):
        assert status.tolist() == [dq.Status.CONVERGED, dq.Status.NON_FINITE, dq.Status.NON_FINITE]
        # z = 2 x: of each of 2 x 3 numbers (2 x - 1)^2 + x^2 is least at x = 2/5.
        assert float(cost[0]) == pytest.approx(6 / 5, rel=1e-4)


def test_a_rank_whose_samples_have_all_stopped_goes_on_evaluating(tmp_path):
    (well, calls), (ill, others) = all_well(run_ranks(tmp_path, "joint_ranks:nan_on_all_of_one", 2))
    assert well.tolist() == [dq.Status.CONVERGED] * 2 and ill.tolist() == [dq.Status.NON_FINITE] * 2
    assert calls == others > 1


def test_an_evaluation_is_two_sums_and_one_for_each_norm_that_the_step_of_x_needs(tmp_path):
    cases = [{}, {"project": Box(-9.0, 9.0)}, {"project": L2Ball(9.0)}, {"normalize": True, "project": L2Ball(9.0)}]
    for found in all_well(run_ranks(tmp_path, "joint_ranks:sums", 2, cases=cases)):
        assert [set(counts) for counts in found] == [{2}, {2}, {3}, {4}]
