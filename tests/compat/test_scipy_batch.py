"""Batches of independent systems in dq.compat.scipy: each row stops by itself, as it would alone."""

from typing import Any

import numpy as np
import pytest
import torch

from deqfast.compat import scipy as ours

N = 20
rng = np.random.default_rng(0)
B = 30
D, C = rng.uniform(0.5, 1.5, (B, N)), rng.standard_normal((B, N))


def rows(x, d=D, c=C):
    return c - d * np.tanh(x) - 0.3 * x + 0.1 * np.roll(x, 1, axis=-1)


@pytest.mark.parametrize("method", ["anderson", "broyden1"])
def test_a_batch_is_its_systems(method):
    sol = ours.root(rows, np.zeros((B, N)), method=method, batched=True, options={"fatol": 1e-9})
    assert sol.success and sol.converged.shape == (B,) and np.abs(sol.fun).max() <= 1e-9
    assert np.array_equal(sol.fun, rows(sol.x))
    for i in range(0, B, 7):
        alone = getattr(ours, method)(lambda x, i=i: rows(x, D[i], C[i]), np.zeros(N), f_tol=1e-9)
        assert np.allclose(sol.x[i], alone, atol=1e-7)
    tensors = ours.anderson(lambda x: torch.as_tensor(rows(x.numpy())), torch.zeros(B, N).double(), batched=True)
    assert np.abs(rows(tensors.numpy())).max() <= 6.1e-6


def test_rows_of_a_batch_stop_by_themselves():
    first: dict[int, Any] = {}

    def look(x, f):
        for i in np.nonzero(np.abs(f).max(1) <= 1e-6)[0]:
            first.setdefault(int(i), x[i].copy())

    start = np.zeros((B, N))
    start[3] = ours.anderson(lambda x: rows(x, D[3], C[3]), np.zeros(N), f_tol=1e-12)
    x = ours.anderson(rows, start, f_tol=1e-6, batched=True, callback=look)
    assert np.array_equal(x[3], start[3]) and len(first) == B
    assert all(np.array_equal(x[i], kept) for i, kept in first.items() if i != 3)


def test_rows_of_a_batch_that_fail_leave_the_others_alone():
    def broken(x):
        out = rows(x)
        out[2] = np.nan
        out[5] = x[5] ** 2 + 1
        return out

    with pytest.raises(ours.NoConvergence) as caught:
        ours.anderson(broken, np.zeros((B, N)), batched=True, maxiter=300)
    assert sorted(np.nonzero(~caught.value.converged)[0]) == [2, 5]
    rest = caught.value.converged
    assert np.abs(rows(caught.value.args[0]))[rest].max() <= 6.1e-6
    sol = ours.root(broken, np.zeros((B, N)), batched=True, options={"maxiter": 60, "jac_options": {"alpha": 0.5}})
    assert not sol.success and sol.converged.sum() == B - 2


def test_batches_by_a_norm_and_by_steps():
    own = {"tol_norm": lambda v: np.linalg.norm(v, axis=1), "fatol": 1e-8}
    sol = ours.root(rows, np.zeros((B, N)), batched=True, options=own)
    assert sol.success and np.linalg.norm(sol.fun, axis=1).max() <= 1e-8
    assert ours.root(rows, np.zeros((B, N)), batched=True, tol=1e-8).success
    x = ours.anderson(rows, np.zeros((B, N)), batched=True, iter=2)
    assert x.shape == (B, N)


def test_batches_that_are_solved_at_once_or_never():
    found = ours.root(lambda x: 1 - x, np.ones((2, 3)), batched=True)
    assert found.nfev == 1 and found.success
    first = ours.root(lambda x: np.where(np.abs(x) > 0, 0.0, 1.0), np.zeros((2, 1)), batched=True)
    assert first.nfev == 2 and first.success
    never = ours.root(lambda x: np.sign(x) + 2, np.zeros((2, 60)), batched=True)
    assert not never.success and never.nfev < 1500
