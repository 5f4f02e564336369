"""What the server makes of updates: equal weights average, faulty updates are left out by name."""

import dataclasses
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import fusion
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

FOLDER = Path(__file__).parents[2] / "examples" / "federated"
FLOATS = st.floats(-(2.0**40), 2.0**40, width=32)


def update(client=0, weights=None, **values):
    known = {"examples": 100, "budget": 8, "residual": 0.01, "score": 0.9}
    weights = {"a": np.float32([[1, 2], [3, 4]]), "b": np.float32([5])} if weights is None else weights
    return fusion.Update(client=client, weights=weights, **{**known, **values})


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 12), st.integers(1, 7)), elements=FLOATS),
    st.floats(1e-30, 1e30),
)
def test_equal_weights_are_the_plain_average_bit_for_bit(theta, weight):
    updates = [update(k, {"a": row}) for k, row in enumerate(theta)]
    average = (sum(row.astype(np.float64) for row in theta) / len(theta)).astype(np.float32)
    fused = fusion.fuse(updates, [weight] * len(updates))["a"]
    assert fused.dtype == np.float32
    assert np.array_equal(fused, average)


def test_equal_weighting_ignores_how_much_data_there_is():
    updates = [update(k, {"a": np.float32([k, 1.1**k])}, examples=10**k, budget=k + 1) for k in range(5)]
    _, weights, _ = fusion.sift(updates, updates[0].weights, fusion.WEIGHTINGS["equal"])
    average = np.mean([u.weights["a"] for u in updates], axis=0, dtype=np.float64).astype(np.float32)
    assert np.array_equal(fusion.fuse(updates, weights)["a"], average)


@given(st.lists(st.tuples(FLOATS, st.floats(0, 1e6)), min_size=1, max_size=8).filter(lambda p: any(w for _, w in p)))
def test_fused_is_the_weighted_mean_to_rounding(pairs):
    updates = [update(k, {"a": np.float32([value])}) for k, (value, _) in enumerate(pairs)]
    weights = [Fraction(weight) for _, weight in pairs]
    exact = sum((w * Fraction(value) for w, (value, _) in zip(weights, pairs, strict=True)), Fraction(0)) / sum(weights)
    scale = max(abs(value) for value, _ in pairs)
    fused = fusion.fuse(updates, [weight for _, weight in pairs])["a"]
    assert abs(float(fused[0]) - float(exact)) <= 2.0**-23 * scale + 1e-45


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("equal", lambda u: 1.0),
        ("data", lambda u: u.examples),
        ("budget", lambda u: u.examples * u.budget),
        ("residual", lambda u: u.examples / (u.residual + 0.01)),
        ("score", lambda u: u.examples * u.score),
    ],
)
def test_weights_are_proportional_to_data_and_quality(name, of):
    updates = [update(0), update(1, examples=300, budget=40, residual=0.0, score=0.5)]
    kept, weights, left_out = fusion.sift(updates, updates[0].weights, fusion.WEIGHTINGS[name])
    assert kept == updates and not left_out
    shares = fusion.normalised(weights)
    assert sum(shares) == pytest.approx(1) and shares[1] / shares[0] == pytest.approx(of(updates[1]) / of(updates[0]))


def test_exponent_and_quality_are_the_users():
    weighting = fusion.Weighting(0.5, lambda u: u.score**2)
    assert weighting(update(examples=16, score=0.5)) == pytest.approx(4 * 0.25)


A, B = np.float32([[1, 2], [3, 4]]), np.float32([5])
FAULTS = {
    "NaN": ({"weights": {"a": A * np.float32(np.nan), "b": B}}, "a has 4 numbers that are not finite"),
    "infinity": ({"weights": {"a": A, "b": B * np.float32(np.inf)}}, "b has 1 numbers that are not finite"),
    "shape": ({"weights": {"a": A[:1], "b": B}}, r"a has shape \(1, 2\), expected \(2, 2\)"),
    "missing": ({"weights": {"a": A}}, r"another architecture: without \['b'\], with nothing more"),
    "unknown": ({"weights": {"a": A, "b": B, "c": B}}, r"another architecture: without nothing, with \['c'\] more"),
    "dtype": ({"weights": {"a": A.astype(np.float64), "b": B}}, "a has dtype float64, expected float32"),
    "no data": ({"examples": 0}, "it trained on 0 digits"),
    "residual": ({"residual": float("nan")}, "its residual is nan"),
    "score": ({"score": float("inf")}, "its score is inf"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_update_is_left_out_and_named_and_the_others_are_fused(fault):
    changes, why = FAULTS[fault]
    good, bad, other = update(4), dataclasses.replace(update(7), **changes), update(2, {"a": 3 * A, "b": B})
    kept, weights, left_out = fusion.sift([good, bad, other], good.weights, fusion.WEIGHTINGS["data"])
    assert [u.client for u in kept] == [2, 4] and list(left_out) == [7]
    assert re.search(why, left_out[7])
    assert np.array_equal(fusion.fuse(kept, weights)["a"], 2 * A)


@pytest.mark.parametrize("quality", [-1.0, float("nan"), float("inf")])
def test_a_client_whose_weight_is_no_weight_is_left_out(quality):
    weighting = fusion.Weighting(1.0, lambda u: quality if u.client == 1 else 1.0)
    kept, _, left_out = fusion.sift([update(0), update(1)], update().weights, weighting)
    assert [u.client for u in kept] == [0]
    assert f"its weight is {100 * quality}" in left_out[1]


def test_two_updates_of_one_client_are_both_left_out():
    updates = [update(1), update(0), update(1), update(1)]
    kept, _, left_out = fusion.sift(updates, updates[0].weights, fusion.WEIGHTINGS["data"])
    assert [u.client for u in kept] == [0] and "more than one" in left_out[1]


def test_order_in_which_updates_come_changes_no_bit():
    random = np.random.default_rng(0)
    updates = [update(k, {"a": random.normal(size=50).astype(np.float32)}, examples=k + 1) for k in range(9)]
    fused = []
    for _ in range(3):
        random.shuffle(updates)
        kept, weights, _ = fusion.sift(updates, updates[0].weights, fusion.WEIGHTINGS["data"])
        fused.append(fusion.fuse(kept, weights)["a"])
    assert np.array_equal(fused[0], fused[1]) and np.array_equal(fused[0], fused[2])


@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf")])
def test_weights_that_are_none_are_refused_by_number(weight):
    with pytest.raises(ValueError, match=r"weights\[1\]: expected a finite number that is not negative, got"):
        fusion.fuse([update(0), update(1)], [1.0, weight])


@pytest.mark.parametrize("count", [0, 2])
def test_weights_that_sum_to_zero_leave_nobody(count):
    with pytest.raises(fusion.NobodyLeft, match="expected one that is positive"):
        fusion.fuse([update(k) for k in range(count)], [0.0] * count)


def test_a_weight_for_each_update():
    with pytest.raises(ValueError, match="expected 2, one an update, got 1"):
        fusion.fuse([update(0), update(1)], [1.0])


def test_weights_as_far_apart_as_floats_go_do_not_overflow():
    fused = fusion.fuse([update(0, {"a": A}), update(1, {"a": -A})], [1e308, 1e308])
    assert np.array_equal(fused["a"], 0 * A)
    assert np.array_equal(fusion.fuse([update(0, {"a": A}), update(1, {"a": -A})], [1e308, 1e-308])["a"], A)


def test_what_needs_no_flower_imports_none():
    code = "import sys; sys.modules['flwr'] = sys.modules['ray'] = None\n"
    code += "import checkpoint, data, fusion, model, timing, training\nprint('imported')"
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "imported", done.stderr
