"""One Broyden step agrees with the formulas in float64; the method is the textbook's "good" Broyden method."""

from __future__ import annotations

import pytest
import torch
from problems import (
    BACKENDS,
    EPS,
    assert_same_decisions,
    double_of,
    in_double,
    linear,
    problem,
    pull,
    rows_of,
    run,
)
from torch import Tensor

import deqfast as dq
from deqfast.loop.state import SolverState
from deqfast.ops.broyden import BroydenWorkspace
from deqfast.ops.codes import Int, Real

OPTIONS = {
    "memory-2": dq.Broyden(memory=2),
    "memory-3": dq.Broyden(memory=3),
    "memory-20": dq.Broyden(memory=20),
    "scaled-memory-2": dq.Broyden(memory=2, scale="first_step"),
    "scaled-memory-20": dq.Broyden(memory=20, scale="first_step"),
}
SIZES = [
    *((17, N) for N in (1, 3, 7, 8, 31, 32, 33, 63, 1000)),
    *((B, 33) for B in (0, 1, 3, 16, 33)),
    (3, 4097),
    (2, 65536),
    (2, 70000),
    (3, 0),
]


class Formula:
    """The chain of a Broyden step in float64, with a bound of what rounding by ``eps`` does to it on the way."""

    def __init__(self, state: SolverState, saved: SolverState, x: Tensor, f: Tensor, eps: float) -> None:
        ws = saved.ws
        assert isinstance(ws, BroydenWorkspace)
        unit = state.ws.real_row(Real.UNIT).double()
        count_after = state.ws.int_row(Int.COUNT)
        self.x = torch.empty_like(x)
        self.tolerance = torch.empty_like(unit)
        for b in range(x.shape[0]):
            count = int(count_after[b]) - 1  # steps that the newest one was made from
            g = (f[b] - x[b]) * unit[b]
            scale = float(state.ws.real_row(Real.SCALE)[b]) or 1.0
            z = g * scale
            # x, f and their difference are rounded before the chain begins, and every product and sum in it.
            error = 2 * eps * float(g.norm() + x[b].norm() * unit[b]) * scale
            denominator, d_error = 1.0, 0.0
            steps = ws.history[b, :count].double()
            for j in range(count):
                s, size = steps[j], float(steps[j].norm())
                ratio = float(s @ z) / size**2
                r_error = (error + eps * float(z.norm())) / size + 4 * eps * abs(ratio)
                if j + 1 < count:
                    s_next = float(steps[j + 1].norm())
                    z = z + ratio * steps[j + 1]
                    error += r_error * s_next + eps * float(z.norm())
                else:
                    denominator, d_error = 1 - ratio, r_error + eps
            step = z / denominator
            self.x[b] = x[b] + step / unit[b]
            spread = (error + float(step.norm()) * (d_error + 4 * eps)) / abs(denominator)
            self.tolerance[b] = 8 * (spread / unit[b] + eps * (x[b].norm() + f[b].norm()))


def check_step(solver: dq.Broyden, state_dtype: torch.dtype, B: int, N: int, backend: str, steps: int) -> None:
    """Every step, taken from the reference's saved state, agrees with the formulas and with float64 decisions."""
    p = problem(B, N, dtype=state_dtype, slowest=0.9, zero=False)
    double = double_of(state_dtype)
    settings = {"rtol": 0.0, "max_iter": steps}
    leader = solver.init(p.z0, backend="reference", **settings)
    state = solver.init(p.z0, backend=backend, **settings)
    oracle = solver.init(p.z0.to(double), backend="reference", **settings)
    before = solver.init(p.z0, backend="reference", **settings)
    while not leader.done:
        saved = leader.state_dict()
        for s in (state, before):
            s.load_state_dict(saved)
        oracle.load_state_dict(in_double(saved, oracle))
        f = pull(state.z, *p.args)
        x, fx = rows_of(state.z), rows_of(f)
        running, best = state.running.clone(), oracle.ws.real_row(Real.BEST).clone()
        for s, value in ((leader, f), (state, f.clone()), (oracle, f.to(double))):
            s.step(value)
        assert_same_decisions(state, oracle, best)
        going = running & state.running
        if not going.any():
            continue
        formula = Formula(state, before, x, fx, EPS[state.layout.acc])
        rounding = EPS[state.layout.dtype] * formula.x.abs() if state.layout.dtype != state.layout.acc else 0
        error = ((rows_of(state.z) - formula.x).abs() - rounding).clamp(min=0).norm(dim=1)
        assert bool((error <= formula.tolerance)[going].all()), (error / formula.tolerance)[going]
        newest = (state.ws.int_row(Int.COUNT) - 1).clamp(min=0).long()
        index = torch.arange(B)
        kept = state.ws.history[index, newest].double()
        squared = state.ws.norms[index, newest].double()  # type: ignore[attr-defined]
        sure = going & (state.ws.int_row(Int.COUNT) > 0)
        assert bool(((squared - kept.square().sum(1)).abs() <= 16 * EPS[state.layout.acc] * squared)[sure].all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", OPTIONS.values(), ids=OPTIONS)
def test_step_agrees_with_float64_formulas_for_all_options(solver, backend):
    check_step(solver, torch.float32, 17, 40, backend, steps=9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", ["unit", "first_step"])
@pytest.mark.parametrize(("B", "N"), SIZES)
def test_step_agrees_with_float64_formulas_for_all_sizes(B, N, scale, backend):
    check_step(dq.Broyden(memory=4, scale=scale), torch.float32, B, N, backend, steps=7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128], ids=str
)
def test_step_agrees_with_float64_formulas_for_all_dtypes(dtype, backend):
    for B, N in ((17, 33), (3, 1), (2, 1500)):
        check_step(dq.Broyden(memory=5), dtype, B, N, backend, steps=7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_gram_form_agrees_with_the_chain_for_all_dtypes(dtype, backend):
    check_step(dq.Broyden(memory=4), dtype, 2, 65600, backend, steps=6)


def good_broyden(f, z: Tensor, steps: int) -> list[Tensor]:
    """Iterates of the "good" method with the inverse held as I + U V^T, two vectors a step (Broyden 1965)."""
    B, N = z.shape
    U, V = torch.zeros(2, B, N, steps, dtype=z.dtype)
    iterates = [z]
    g = f(z) - z
    for k in range(steps):
        step = g + (U @ (V.mT @ g[..., None]))[..., 0]  # -B^-1 F with F = -g and B^-1 = I + U V^T
        z = z + step
        g_new = f(z) - z
        y = g - g_new
        inverse_y = y + (U @ (V.mT @ y[..., None]))[..., 0]
        inverse_t_step = step + (V @ (U.mT @ step[..., None]))[..., 0]
        U[..., k] = (step - inverse_y) / (step * inverse_y).sum(1, keepdim=True)
        V[..., k] = inverse_t_step
        g = g_new
        iterates.append(z)
    return iterates


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("N", [5, 32, 40, 66000])
def test_iterates_are_those_of_the_two_factor_form(N, backend):
    steps = 6 if N > 1000 else 12
    p = problem(3 if N < 1000 else 1, N, dtype=torch.float64, slowest=0.8)
    expected = good_broyden(lambda z: pull(z, *p.args), p.z0, steps)
    state = dq.Broyden().init(p.z0, rtol=0.0, max_iter=steps + 1, backend=backend)
    for k in range(steps):
        error = (state.z - expected[k]).norm(dim=1)
        # Each form amplifies rounding by the condition of its inverse; both are within 1e4 eps of the exact iterates
        # as long as residuals are far above rounding.
        assert bool((error <= 1e4 * EPS[torch.float64] * expected[k].norm(dim=1)).all()), (k, error)
        if float((expected[k + 1] - expected[k]).norm(dim=1).min()) < 1e-9:
            break
        state.step(pull(state.z, *p.args))
    assert k >= 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_evaluation_count_is_that_of_the_two_factor_form(seed, backend):
    f, _ = linear(1, 60, norm=0.95, seed=seed)
    z0 = torch.zeros(1, 60, dtype=torch.float64)
    iterates = good_broyden(f, z0, 80)
    residuals = [float((f(z) - z).norm() / f(z).norm()) for z in iterates]
    expected = 1 + next(k for k, r in enumerate(residuals) if r <= 1e-6)
    sol = dq.fixed_point(f, z0, solver="broyden", rtol=1e-6, backend=backend)
    assert bool(sol.converged.all())
    assert abs(int(sol.steps.max()) - expected) <= 1  # a device may evaluate f more often than the sample needs


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_memory_restarts_and_still_converges(backend):
    p = problem(5, 30, dtype=torch.float64, slowest=0.9)
    sol = dq.fixed_point(pull, p.z0, p.args, solver=dq.Broyden(memory=3), rtol=1e-10, backend=backend)
    assert bool(sol.converged.all())
    assert bool((sol.events["full_restarts"] > 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_is_measured_on_the_first_step_within_its_limits(backend):
    rates = torch.tensor([[0.9], [0.5], [-3.0], [-20.0]], dtype=torch.float64)
    b = torch.ones(4, 6, dtype=torch.float64)
    state = dq.Broyden(scale="first_step").init(torch.zeros(4, 6, dtype=torch.float64), rtol=0.0, backend=backend)
    run(state, lambda z: rates * z + b, 2)
    expected = (1 / (1 - rates[:, 0])).clamp(0.2, 5.0)  # s.y / y.y of a map with y = (1 - rate) s
    assert torch.allclose(state.ws.real_row(Real.SCALE), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vanishing_denominator_restarts_that_sample_alone(backend):
    """g equal to the last step makes 1 - s.g / ||s||^2 zero."""
    z0 = torch.zeros(3, 5, dtype=torch.float64)
    state = dq.Broyden().init(z0, rtol=0.0, backend=backend)
    v = torch.arange(1.0, 6.0, dtype=torch.float64).expand(3, 5)
    state.step(z0 + v)
    state.step(state.z + v * torch.tensor([[1.0], [0.5], [0.25]], dtype=torch.float64))
    assert state.ws.int_row(Int.DENOMINATOR_RESTARTS).tolist() == [1, 0, 0]
    assert bool(torch.isfinite(state.z).all())
    assert torch.allclose(state.z[0], 2 * v[0], rtol=1e-14, atol=0)  # a plain step


@pytest.mark.parametrize("memory", [0, 1, -3])
def test_memory_below_two_raises(memory):
    with pytest.raises(ValueError, match=rf"memory must be at least 2, got {memory}"):
        dq.Broyden(memory=memory)


@pytest.mark.parametrize("memory", [2.0, True, "4"])
def test_memory_that_is_no_int_raises(memory):
    with pytest.raises(TypeError, match="memory must be an int or None"):
        dq.Broyden(memory=memory)


def test_unknown_scale_and_unknown_options_raise():
    with pytest.raises(ValueError, match=r"scale must be 'unit' or 'first_step', got 'last'"):
        dq.Broyden(scale="last")
    with pytest.raises(TypeError, match="damping"):
        dq.Broyden(damping=0.5)  # type: ignore[call-arg]
