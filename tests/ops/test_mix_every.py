"""Anderson(mix_every=p): every p-th evaluation mixes, the others take the plain step, and every column is recorded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import BACKENDS, DEVICE, problem, pull, rows_of, same_state

import deqfast as dq
from deqfast.ops.codes import Int

RIDGE = 1e-6
SOLVERS = {
    **{f"{kind}-{p}-{m}": dq.Anderson(m=m, type=kind, mix_every=p, ridge=RIDGE) for kind in ("mixed", 1, 2)
       for p, m in ((2, 5), (3, 7), (2, 10))},
    "oldest": dq.Anderson(m=6, mix_every=3, evict="oldest", ridge=RIDGE),
    "mixing": dq.Anderson(m=5, mix_every=2, mixing=0.6, ridge=RIDGE),
    "every": dq.Anderson(m=5, mix_every=1, ridge=RIDGE),
}  # fmt: skip


class Sample:
    """One sample in NumPy, column by column."""

    def __init__(self, solver: dq.Anderson, x: np.ndarray) -> None:
        self.o, self.x = solver, x
        self.columns: dict[int, tuple[np.ndarray, np.ndarray, int]] = {}
        self.slot, self.k, self.evicted = 0, 0, 0
        self.before: tuple[np.ndarray, np.ndarray] | None = None

    def step(self, f: np.ndarray) -> None:
        o, g = self.o, f - self.x
        self.k += 1
        if self.before is not None:
            if o.type == 2 and np.linalg.norm(g) > 1.5 * np.linalg.norm(self.before[1]):
                self.columns.clear()
            self.columns[self.slot] = (f - self.before[0], g - self.before[1], self.k)
        self.before = f, g
        self.x = self.x + o.mixing * g
        mixes = self.k % o.mix_every == 0
        score = self._mix(g) if mixes and self.columns else {}
        self._choose_slot(score, o.mix_every if mixes else 1)

    def _mix(self, g: np.ndarray) -> dict[int, float]:
        o, slots = self.o, sorted(self.columns)
        dF, dG = (np.stack([self.columns[j][i] for j in slots], axis=1) for i in (0, 1))
        W = {"mixed": dF - 2 * dG, 1: dF - dG, 2: -dG}[o.type]
        q, w = np.linalg.norm(dG, axis=0), np.linalg.norm(W, axis=0)
        E = -(W / w).T @ (dG / q) + RIDGE * np.eye(len(slots))
        y = np.linalg.solve(E, -(W / w).T @ g)
        self.x = self.x - (dF - (1 - o.mixing) * dG) @ (y / q)
        ages = np.array([self.columns[j][2] for j in slots])
        if o.evict == "oldest" or o.m <= 3:
            return dict(zip(slots, ages.astype(float), strict=True))
        inverse = np.linalg.inv((dG / q).T @ (dG / q) + RIDGE * np.eye(len(slots)))
        use = y**2 / np.diag(inverse)
        return dict(zip(slots, np.where(ages > self.k - max(2, o.m // 3), np.inf, use), strict=True))

    def _choose_slot(self, score: dict[int, float], wanted: int) -> None:
        m = self.o.m
        full = len(self.columns) == m
        self.slot = min(score, key=lambda j: score[j]) if full else min(set(range(m)) - set(self.columns))
        self.evicted += full
        while m - len(self.columns) + full < wanted:
            others = {j: use for j, use in score.items() if j in self.columns and j != self.slot}
            del self.columns[min(others, key=lambda j: others[j])]
            self.evicted += 1


def slow_map(B: int, N: int):
    """A start, and a map that takes long: as many rates as numbers, and a term that is not linear."""
    generator = torch.Generator().manual_seed(N)
    c = torch.randn(B, N, generator=generator, dtype=torch.float64).to(DEVICE)
    rates = torch.linspace(-0.5, 0.99, N, dtype=torch.float64).to(DEVICE)
    return torch.zeros_like(c), lambda z: rates * z + 0.2 / (1 + z.roll(1, -1) ** 2) + c


def check_against_samples(solver: dq.Anderson, B: int, N: int, backend: str, steps: int) -> None:
    """Iterates and counts are those of the samples in NumPy."""
    z0, slow = slow_map(B, N)
    state = solver.init(z0, rtol=0.0, backend=backend)
    samples = [Sample(solver, x.numpy()) for x in rows_of(z0)]
    for _ in range(steps):
        f = slow(state.z)
        for sample, row in zip(samples, rows_of(f), strict=True):
            sample.step(row.numpy())
        state.step(f)
        got = rows_of(state.z)
        for i, sample in enumerate(samples):
            assert np.linalg.norm(got[i].numpy() - sample.x) <= 1e-6 * (1 + np.linalg.norm(sample.x))
            sample.x = got[i].numpy()  # so that rounding does not grow over the steps
    ints = state.ws.ints[:, :B]
    assert ints[Int.COUNT].tolist() == [len(s.columns) for s in samples]
    assert ints[Int.EVICTIONS].tolist() == [s.evicted for s in samples]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("N", [11, 40, 1100])
def test_steps_are_those_of_every_sample_by_itself(solver, N, backend):
    check_against_samples(solver, 3, N, backend, steps=2 * solver.m)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mixing", [1.0, 0.7])
def test_evaluations_between_mixes_take_the_plain_step(mixing, backend):
    p = problem(4, 30, dtype=torch.float64, slowest=0.9, zero=False)
    state = dq.Anderson(m=6, mixing=mixing, mix_every=3).init(p.z0, rtol=0.0, backend=backend)
    for k in range(1, 14):
        z = state.z.clone()
        f = pull(z, *p.args)
        state.step(f)
        plain = torch.allclose(state.z, z + mixing * (f - z), rtol=1e-14, atol=1e-14)
        assert plain == (k % 3 != 0), k


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["mixed", 1, 2])
def test_solves_what_it_solves_with_every_mix(kind, backend):
    p = problem(8, 60, slowest=0.97, zero=False)
    every, second = (
        dq.fixed_point(pull, p.z0, p.args, solver=dq.Anderson(m=20, type=kind, mix_every=e), rtol=1e-4, backend=backend)
        for e in (1, 2)
    )
    assert bool(every.converged.all()) and bool(second.converged.all())
    assert second.nfe <= 1.5 * every.nfe + 2


def test_one_is_the_default_bit_for_bit():
    p = problem(5, 70, slowest=0.9, zero=False)
    states = [solver.init(p.z0, rtol=0.0) for solver in (dq.Anderson(m=4), dq.Anderson(m=4, mix_every=1))]
    for _ in range(12):
        for state in states:
            state.step(pull(state.z, *p.args))
    assert same_state(*states)


def test_samples_of_few_numbers_mix_as_often_as_their_columns_allow():
    solver = dq.Anderson(m=10, mix_every=5)
    methods = [solver.init(torch.zeros(2, N)).ws.method for N in (1, 3, 6, 9, 50)]
    assert [method.mix_every for method in methods] == [1, 1, 4, 5, 5]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (0, ValueError, "mix_every must be at least 1, got 0"),
        (2.0, TypeError, "mix_every must be an int, got float"),
        (True, TypeError, "mix_every must be an int, got bool"),
        (8, ValueError, r"mix_every must be at most 7 with m=10, got 8"),
    ],
)
def test_wrong_values_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        dq.Anderson(mix_every=given)


def test_gradients_through_the_loop_are_those_of_its_answer():
    torch.manual_seed(0)
    W = (0.4 * torch.randn(6, 6, dtype=torch.float64) / 6**0.5).requires_grad_()
    x = torch.randn(3, 6, dtype=torch.float64)

    def solve(backward):
        options = {"solver": dq.Anderson(m=4, mix_every=2), "rtol": 1e-12, "backward": backward}
        sol = dq.fixed_point(lambda z: torch.tanh(z @ W + x), torch.zeros_like(x), **options)
        return sol, torch.autograd.grad(sol.z.square().sum(), W)[0]

    (unrolled, through), (plain, implicit) = solve(dq.Unroll()), solve(None)
    assert torch.allclose(unrolled.z, plain.z, rtol=1e-10)
    assert torch.equal(unrolled.steps, plain.steps)
    assert torch.allclose(through, implicit, rtol=1e-6)
