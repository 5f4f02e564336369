"""Measured defects of torchdeq 0.1.0: the claims that deqfast's tests hold it to (bench/claims.py) fail there.

`pytest bench/test_rival_defects.py`, which `make bench` runs. A row that starts to fail says that the rival got better.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from bench.claims import (
    Counted,
    Map,
    assert_compiled_in_three_graphs,
    assert_damping_does_not_flatter,
    assert_faster_than_plain,
    assert_finished_samples_rest,
    assert_limited_memory_converges,
    assert_nan_sample_is_contained,
    assert_scaled_counts,
    assert_slow_sample_pays_alone,
    assert_tolerance_is_honoured,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # escapes in its docstrings
    torchdeq = pytest.importorskip("torchdeq")
pytestmark = pytest.mark.filterwarnings("ignore")  # a rival warns as it likes


def solver(name: str) -> Any:
    return torchdeq.solver.get_solver(name)


def evaluations(f: Map, z0: torch.Tensor, rtol: float, name: str = "anderson", **options: Any) -> int:
    counted = Counted(f)
    stat = solver(name)(counted, z0, max_iter=400, tol=rtol, stop_mode="rel", **options)[2]
    assert bool((stat["rel_lowest"] < rtol).all()), "did not converge"
    return len(counted.rows)


def test_scale_of_a_problem_changes_the_evaluations() -> None:
    with pytest.raises(AssertionError):
        assert_scaled_counts(evaluations)


def test_acceleration_loses_to_plain_iteration_with_the_defaults() -> None:
    with pytest.raises(AssertionError):
        assert_faster_than_plain(evaluations, lambda f, z0, rtol: evaluations(f, z0, rtol, "fixed_point_iter"))


@pytest.mark.parametrize("name", ["anderson", "broyden", "fixed_point_iter"])
def test_nan_sample_loses_its_best_iterate(name: str) -> None:
    with pytest.raises(AssertionError):
        assert_nan_sample_is_contained(lambda f, z0: solver(name)(f, z0, max_iter=400, tol=1e-9, stop_mode="rel")[0])


def test_broyden_with_six_columns_does_not_converge() -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        assert_limited_memory_converges(lambda f, z0, rtol: evaluations(f, z0, rtol, "broyden", LBFGS_thres=6))


def test_finished_samples_still_move() -> None:
    run = solver("fixed_point_iter")
    with pytest.raises(AssertionError, match="still move"):
        assert_finished_samples_rest(lambda f, z0: run(f, z0, max_iter=3000, tol=1e-8, stop_mode="rel", tau=0.9))


def test_all_pay_for_a_slow_sample() -> None:
    run = solver("fixed_point_iter")
    with pytest.raises(AssertionError, match="every evaluation saw every sample"):
        assert_slow_sample_pays_alone(
            lambda f, z0, rate: run(lambda z: f(z, rate), z0, max_iter=3000, tol=1e-6, stop_mode="rel")
        )


def test_unknown_options_pass() -> None:
    deq = torchdeq.get_deq(tolerance=1e-3, nonsense=True)
    z, _ = deq(lambda z: 0.5 * z + 1, torch.zeros(2, 3))
    assert z[-1].shape == (2, 3)
    solver("anderson")(lambda z: 0.5 * z + 1, torch.zeros(2, 3), tolerance=1e-3)


def test_tolerance_of_a_call_is_ignored() -> None:
    def residual(tol: float) -> float:
        deq = torchdeq.get_deq(f_max_iter=500, f_stop_mode="rel")
        _, info = deq(lambda z: 0.9 * z + 1, torch.zeros(2, 3, dtype=torch.float64), solver_kwargs={"f_tol": tol})
        return float(info["rel_lowest"].max())

    with pytest.raises(AssertionError):
        assert_tolerance_is_honoured(residual)


def test_configuration_of_the_caller_is_changed() -> None:
    config = {"f_max_iter": 7}
    torchdeq.get_deq(config, f_tol=1e-2)
    assert config != {"f_max_iter": 7}


def test_damped_iteration_reports_less_than_the_residual_of_f() -> None:
    run, z0 = solver("fixed_point_iter"), torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_damping_does_not_flatter(
            lambda damping: float(run(lambda z: 0.5 * z + 1, z0, max_iter=1, tau=damping)[2]["abs_lowest"][0])
        )


def test_a_compiled_model_falls_apart() -> None:
    with pytest.raises(AssertionError, match="graph breaks"):
        assert_compiled_in_three_graphs(torchdeq.get_deq(), lambda found: found[0][-1])
