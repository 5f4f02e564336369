"""Ranks that were given what does not fit together are told so, all of them, and none waits for another."""

from __future__ import annotations

import re

import pytest
import torch
from ranks import run_ranks

import deqfast as dq
from deqfast.ops.native import extension as native

native_only = pytest.mark.skipif(native._C is None or native.EMULATED, reason="the extension is not built")

WRONG = {
    "samples": (
        [{"shape": (2, 3)}, {"shape": (4, 3)}],
        "RankError",
        r"ranks must agree on samples, got rank 0: .*2.*rank 1: .*4",
    ),
    "rtol": ([{"rtol": 1e-4}, {"rtol": 1e-6}], "RankError", r"agree on rtol, got rank 0: 0.0001; rank 1: 1e-06"),
    "max_iter": ([{"max_iter": 5}, {"max_iter": 6}], "RankError", "agree on max_iter"),
    "solver": ([{"solver": dq.Anderson(m=3)}, {"solver": dq.Anderson(m=4)}], "RankError", "agree on solver.*m=3.*m=4"),
    "dtype": ([{"dtype": torch.float32}, {"dtype": torch.float64}], "RankError", "agree on (rtol|dtype of z0)"),
    "stop": ([{"stop": "all"}, {"stop": "each"}], "RankError", "agree on stop"),
    "one option is wrong": (
        [{}, {"rtol": -1.0}],
        "RankError|ValueError",
        "rtol must be finite and not negative, got -1.0",
    ),
    "z0 is wrong": ([{}, {"dtype": torch.int64}], "RankError|TypeError", "z0 must be float64.*got torch.int64"),
    "consensus, rtol": (
        [{"stop": "consensus", "rtol": 1e-4}, {"stop": "consensus", "rtol": 1e-6}],
        "RankError",
        "agree on rtol",
    ),
    "consensus, shapes may differ": (
        [{"stop": "consensus", "shape": (2, 3)}, {"stop": "consensus", "shape": (5, 3)}],
        "nothing",
        "",
    ),
    "compact": ([{"compact": True}], "ValueError", "group does not go together with compact"),
    "segments": ([{"segments": torch.tensor([0, 0])}], "ValueError", "group does not go together with segments"),
    "mode": ([{"mode": "graph"}], "ValueError", "group does not go together with mode='graph'"),
    "unroll": ([{"backward": dq.Unroll()}], "ValueError", "group does not go together with backward=dq.Unroll()"),
    "backend": ([{"backend": "torch"}], "ValueError", "group needs a backend whose steps can be spread over ranks"),
}


@native_only
def test_every_rank_says_what_is_wrong(tmp_path):
    cases = [given for given, _, _ in WRONG.values()]
    ranks = run_ranks(tmp_path, "spread_maps:wrong", 2, cases=cases)
    for name, told in zip(WRONG, zip(*ranks, strict=True), strict=True):
        _, kinds, words = WRONG[name]
        for kind, said in told:
            assert kind in kinds.split("|"), (name, told)
            assert re.search(words, said), (name, told)


@native_only
def test_nan_on_one_rank_stops_its_sample_on_all(tmp_path):
    for found in run_ranks(tmp_path, "spread_maps:nan_on_one", 2):
        assert found["status"].tolist() == [dq.Status.CONVERGED, dq.Status.NON_FINITE]
        assert torch.allclose(found["z"][0], torch.full((3,), 2.0), rtol=1e-3)


@native_only
def test_a_loop_by_hand_is_saved_and_taken_up(tmp_path):
    for found in run_ranks(tmp_path, "spread_maps:own_loop", 2, folder=str(tmp_path)):
        for same, nfe, again, refused in found.values():
            assert same and nfe == again
            assert refused == [
                "a copy of a solve that ranks share cannot be made on one of them",
                "a smaller batch of a solve that ranks share cannot be made on one of them",
                "residual cannot be given where ranks share every sample: no kernel adds it up over them",
            ]


@native_only
def test_a_rank_that_dies_ends_the_others_with_an_error(tmp_path):
    survivor, dead = run_ranks(tmp_path, "spread_maps:one_dies", 2)
    assert isinstance(dead, RuntimeError) and "died" in str(dead)
    assert isinstance(survivor, RuntimeError) and "peer" in str(survivor)  # gloo's own words


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match=r"call torch\.distributed\.init_process_group first"):
        dq.fixed_point(lambda z: 0.5 * z, torch.ones(2, 3), stop="consensus")
    with pytest.raises(ValueError, match="stop must be one of 'each', 'all', 'consensus', got 'both'"):
        dq.fixed_point(lambda z: 0.5 * z, torch.ones(2, 3), stop="both")
