"""One Anderson step agrees with the formulas in float64, whatever the options, the dtypes and the sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from problems import (
    BACKENDS,
    EPS,
    assert_same_decisions,
    double_of,
    in_double,
    linear,
    needs_native,
    problem,
    pull,
    rows_of,
    same_bits,
)
from torch import Tensor

import deqfast as dq
from deqfast.loop.state import SolverState
from deqfast.ops.anderson import AndersonWorkspace
from deqfast.ops.codes import Int, Real
from deqfast.ops.plain.codec import stored as decode
from deqfast.ops.workspace import untile

RIDGE = 1e-4  # given explicitly: the default depends on the dtype
HISTORY = {
    "f64": torch.float64,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "int8": torch.int8,
}


def options(**changes) -> dq.Anderson:
    return dataclasses.replace(dq.Anderson(m=5, ridge=RIDGE, history_dtype=torch.float32), **changes)


OPTIONS = {
    **{f"{kind}-m{m}": options(type=kind, m=m) for kind in ("mixed", 1, 2) for m in (1, 2, 3, 5, 10)},
    **{f"{kind}-mixing": options(type=kind, mixing=0.7) for kind in ("mixed", 1, 2)},
    **{f"{kind}-oldest": options(type=kind, evict="oldest") for kind in ("mixed", 1, 2)},
    **{
        f"{kind}-history-{name}": options(type=kind, m=4, history_dtype=dtype)
        for kind in ("mixed", 1, 2)
        for name, dtype in HISTORY.items()
        if name not in ("f32", "f64")
    },
    "large-ridge": options(ridge=0.3),
    "small-ridge": options(ridge=1e-6),
}
SIZES = [
    *((17, N) for N in (1, 3, 7, 8, 31, 32, 63, 1000)),
    *((B, 33) for B in (0, 1, 3, 16, 17, 33)),
    (3, 4097),
    (2, 70000),
    (3, 0),
]


class Formula:
    """x_{k+1} from the columns a state holds after a step, in float64, and how far rounding may move it."""

    def __init__(self, state: SolverState, x: Tensor, f: Tensor) -> None:
        ws, solver = state.ws, state.options
        assert isinstance(ws, AndersonWorkspace)
        assert isinstance(solver, dq.Anderson)
        B, m = ws.layout.B, ws.method.m
        unit = ws.real_row(Real.UNIT).double()[:, None]
        g = (f - x) * unit
        ws.settle()
        valid = untile(ws.norms, B)[:, 0] > 0
        dF, dG = (torch.where(valid[..., None], decode(ws, i).double(), 0) for i in (0, 1))
        W = {"mixed": dF - 2 * dG, 1: dF - dG, 2: -dG}[solver.type]
        q, w = (torch.where(valid, t.norm(dim=2), 1) for t in (dG, W))
        eye = torch.eye(m, dtype=torch.float64)
        both = valid[:, :, None] & valid[:, None, :]
        sign = 1 if solver.type == 2 else -1  # Type II is written with its Gram matrix: both sides change sign
        E = torch.where(both, (dG if sign > 0 else -W) @ dG.mT / (w[:, :, None] * q[:, None, :]), 0)
        E = E + solver.ridge * eye + torch.diag_embed((~valid).double())
        rho = -(W @ g[..., None])[..., 0] / w
        y = torch.linalg.solve(E, rho)
        gamma = torch.where(valid, y / q, 0)
        moved = dF - (1 - solver.mixing) * dG
        self.x = x + solver.mixing * (f - x) - (gamma[:, None, :] @ moved)[:, 0] / unit
        sigma = torch.linalg.svdvals(E)
        self.condition = sigma[:, 0] / sigma[:, -1]
        self.spread = ((gamma.abs() * moved.norm(dim=2)).sum(1) / unit[:, 0]).nan_to_num()
        self.size = x.norm(dim=1) + f.norm(dim=1)

    def tolerance(self, eps: float) -> Tensor:
        return 2 * eps * (self.size + self.condition * self.spread)


def check_step(solver: dq.Anderson, state_dtype: torch.dtype, B: int, N: int, backend: str, steps: int) -> None:
    """Every step, taken from the reference's saved state, agrees with the formulas and with float64 decisions."""
    p = problem(B, N, dtype=state_dtype, slowest=0.9, zero=False)
    double = double_of(state_dtype)
    settings = {"rtol": 0.0, "max_iter": steps}
    leader = solver.init(p.z0, backend="reference", **settings)
    state = solver.init(p.z0, backend=backend, **settings)
    oracle = solver.init(p.z0.to(double), backend="reference", **settings)
    while not leader.done:
        saved = leader.state_dict()
        state.load_state_dict(saved)
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
        assert_columns(state, oracle, going)
        formula = Formula(state, x, fx)
        got = rows_of(state.z)
        rounding = EPS[state.layout.dtype] * formula.x.abs() if state.layout.dtype != state.layout.acc else 0
        error = ((got - formula.x).abs() - rounding).clamp(min=0).norm(dim=1)
        bound = formula.tolerance(EPS[state.layout.acc])
        assert bool((error <= bound)[going].all()), (error / bound)[going]


def assert_columns(state: SolverState, oracle: SolverState, going: Tensor) -> None:
    """The stored columns are the float64 ones rounded to the history dtype, to one unit in the last place."""
    assert isinstance(state.ws, AndersonWorkspace)
    state.ws.settle()
    dtype, acc = state.ws.history.dtype, EPS[state.layout.acc]
    ulp = {torch.int8: 2.0**-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}.get(dtype, 2 * acc)
    used = (untile(oracle.ws.norms, oracle.layout.B)[:, 0] > 0) & going[:, None]  # type: ignore[attr-defined]
    # The differences f - f_prev and x - x_prev are rounded in the accumulation dtype first.
    scale = rows_of(oracle.evaluated()).abs().amax(dim=1) * oracle.ws.real_row(Real.UNIT)
    slack = 4 * acc * scale[:, None, None]
    for which in (0, 1):
        got, expected = decode(state.ws, which).double(), decode(oracle.ws, which).double()
        size = expected.abs()
        if dtype == torch.int8:  # one scale for a block of numbers
            size = size.amax(dim=2, keepdim=True)
        elif dtype == torch.float16:
            size = size + 2.0**-14 * size.amax(dim=2, keepdim=True)
        assert bool((((got - expected).abs() <= ulp * size + slack) | ~used[..., None]).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", OPTIONS.values(), ids=OPTIONS)
def test_step_agrees_with_float64_formulas_for_all_options(solver, backend):
    check_step(solver, torch.float32, 17, 40, backend, steps=solver.m + 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["mixed", 1, 2])
@pytest.mark.parametrize(("B", "N"), SIZES)
def test_step_agrees_with_float64_formulas_for_all_sizes(B, N, kind, backend):
    m = 4 if B * N < 50_000 else 2
    check_step(options(type=kind, m=m), torch.float32, B, N, backend, steps=m + 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["mixed", 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128], ids=str)
def test_step_agrees_with_float64_formulas_for_wide_and_complex_states(dtype, kind, backend):
    history = dtype.to_real() if dtype.is_complex else dtype
    for B, N in ((17, 33), (3, 1), (2, 1500)):
        check_step(options(type=kind, m=4, history_dtype=history), dtype, B, N, backend, steps=8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("history", ["bf16", "f16", "int8"])
def test_low_precision_columns_are_rounded_once_in_blocks(history, dtype, backend):
    check_step(options(m=3, history_dtype=HISTORY[history]), dtype, 3, 2100, backend, steps=6)


@needs_native
@pytest.mark.parametrize("solver", [OPTIONS[name] for name in ("mixed-m5", "1-m5", "2-m5", "mixed-history-int8")])
def test_native_columns_have_the_bits_of_the_reference(solver):
    p = problem(5, 1100, zero=False)
    states = [solver.init(p.z0, rtol=0.0, backend=backend) for backend in ("reference", "native")]
    for _ in range(7):
        states[1].load_state_dict(states[0].state_dict())
        f = pull(states[0].z, *p.args)
        for state in states:
            state.step(f.clone())
        for name in ("history", "scales", "ages", "ints"):
            assert same_bits(*(getattr(state.ws, name) for state in states)), name


# ---- facts about the method ----


def textbook(f, z: Tensor, m: int, steps: int) -> list[Tensor]:
    """Type II Anderson by least squares on the last m residual differences (Walker and Ni 2011, eq. 2.2)."""
    iterates, values, residuals = [z], [], []
    for _ in range(steps):
        values.append(f(z))
        residuals.append(values[-1] - z)
        gs, fs = torch.stack(residuals[-m - 1 :], dim=2), torch.stack(values[-m - 1 :], dim=2)
        if gs.shape[2] == 1:
            z = values[-1]
        else:
            columns, newest = gs.diff(dim=2).cpu(), residuals[-1][..., None].cpu()  # this driver is the CPU's
            gamma = torch.linalg.lstsq(columns, newest, driver="gelsd").solution.to(z.device)
            z = values[-1] - (fs.diff(dim=2) @ gamma)[..., 0]
        iterates.append(z)
    return iterates


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("m", [1, 2, 4])
def test_type_2_without_ridge_is_the_textbook_method(m, backend):
    p = problem(4, 30, dtype=torch.float64, slowest=0.9)
    expected = textbook(lambda z: pull(z, *p.args), p.z0, m, 9)
    # No growth restart in the textbook: these problems' residuals never grow by half.
    state = dq.Anderson(m=m, type=2, ridge=0.0, evict="oldest").init(p.z0, rtol=0.0, backend=backend)
    for z in expected:
        # The normal equations square the condition of the differences, which stays below 1e4 here; errors then pass
        # through nine contracting steps.
        error = (state.z - z).norm(dim=1)
        assert bool((error <= 1e9 * EPS[torch.float64] * z.norm(dim=1)).all()), error
        state.step(pull(state.z, *p.args))
    assert not bool(state.ws.int_row(Int.GROWTH_RESTARTS).any())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("N", [1, 2, 5, 8])
def test_type_2_solves_a_linear_problem_once_it_has_as_many_columns_as_numbers(N, backend):
    f, exact = linear(6, N, norm=0.5, seed=N)
    sol = dq.fixed_point(
        f, torch.zeros_like(exact), solver=dq.Anderson(m=N + 1, type=2, ridge=0.0), rtol=1e-9, backend=backend
    )
    assert bool(sol.converged.all())
    assert int(sol.steps.max()) <= N + 2
    # ||z - z*|| <= ||f(z) - z|| / (1 - ||A||)
    assert bool(((sol.z - exact).norm(dim=1) <= 2 * 1e-9 * f(sol.z).norm(dim=1)).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["mixed", 1, 2])
def test_every_type_solves_a_map_that_plain_iteration_cannot(kind, backend):
    f, exact = linear(3, 12, norm=1.0, seed=2)
    rotation = lambda z: f(1.3 * z)  # noqa: E731
    solver = dq.Anderson(m=12, type=kind)
    sol = dq.fixed_point(rotation, torch.zeros_like(exact), solver=solver, rtol=1e-10, backend=backend)
    plain = dq.fixed_point(rotation, torch.zeros_like(exact), solver="picard", rtol=1e-10, backend=backend)
    assert bool(sol.converged.all())
    assert int(sol.nfe) < int(plain.nfe)


@pytest.mark.parametrize("backend", BACKENDS)
def test_growth_of_a_type_2_residual_keeps_the_newest_column_alone(backend):
    z0 = torch.zeros(2, 6, dtype=torch.float64)
    state = dq.Anderson(m=4, type=2).init(z0, rtol=0.0, backend=backend)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(6, 6, dtype=torch.float64, generator=generator, device="cpu")
    directions = torch.linalg.qr(drawn)[0].to(z0.device)
    for size, other in ((1.0, 1.0), (0.9, 0.9), (0.8, 0.8), (1.21, 1.19)):  # 1.5 times 0.8 is 1.2
        sizes = torch.tensor([[size], [other]], dtype=torch.float64)
        state.step(state.z + sizes * directions[state.nfe])
    assert state.ws.int_row(Int.GROWTH_RESTARTS).tolist() == [1, 0]
    assert state.ws.int_row(Int.COUNT).tolist() == [1, 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_oldest_column_is_evicted_when_asked_and_newest_columns_never(backend):
    p = problem(9, 20, dtype=torch.float64, slowest=0.9)
    for evict in ("oldest", "least_useful"):
        state = dq.Anderson(m=5, evict=evict).init(p.z0, rtol=0.0, backend=backend)
        for _ in range(12):
            state.step(pull(state.z, *p.args))
            ages = untile(state.ws.own()["ages"], 9)
            slot = state.ws.int_row(Int.SLOT).long()
            if not bool((state.ws.int_row(Int.COUNT) == 5).all()):
                continue
            victim = ages[torch.arange(9), slot]
            assert bool(((victim <= state.steps - 2) | ~state.running).all())
            if evict == "oldest":
                assert bool(((victim == ages.min(dim=1).values) | ~state.running).all())
        assert bool((state.ws.int_row(Int.EVICTIONS) > 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_failed_small_solve_takes_a_plain_step_and_forgets_that_sample_alone(backend):
    """Two equal columns without a ridge make the matrix singular."""
    z0 = torch.zeros(2, 4, dtype=torch.float64)
    state = dq.Anderson(m=3, type=1, ridge=0.0).init(z0, rtol=0.0, backend=backend)
    unit = torch.eye(4, dtype=torch.float64)
    f = torch.stack([unit[0], unit[0]])
    state.step(f)
    # dX = f_0 and dG orthogonal to it: W^T dG = 0.
    state.step(torch.stack([unit[0] + unit[0] + unit[1], unit[0] + 0.5 * unit[0]]))
    assert state.ws.int_row(Int.SOLVE_FALLBACKS).tolist() == [1, 0]
    assert state.ws.int_row(Int.COUNT).tolist() == [0, 1]
    assert torch.equal(state.z[0], 2 * unit[0] + unit[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_overflowing_step_takes_a_plain_step(backend):
    """A nearly constant residual makes the mixed step larger than float16 can hold."""
    z0 = torch.zeros(2, 3, dtype=torch.float16)
    state = dq.Anderson(m=2, ridge=0.0).init(z0, rtol=0.0, backend=backend)
    step = torch.tensor([[2.0e4], [1.0]], dtype=torch.float16).expand(2, 3)
    state.step(step)
    factor = torch.tensor([[1.0 - 2.0**-9], [0.5]], dtype=torch.float16)
    f = state.z + factor * step
    state.step(f)
    assert state.ws.int_row(Int.STEP_FALLBACKS).tolist() == [1, 0]
    assert torch.equal(state.z[0], f[0])
    assert bool(torch.isfinite(state.z).all())


@pytest.mark.parametrize("m", [0, -1])
def test_fewer_than_one_column_raises(m):
    with pytest.raises(ValueError, match=rf"m must be at least 1, got {m}"):
        dq.Anderson(m=m)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"m": 2.0}, TypeError, "m must be an int, got float"),
        ({"m": True}, TypeError, "m must be an int, got bool"),
        ({"type": 3}, ValueError, "type must be 'mixed', 1 or 2, got 3"),
        ({"type": "II"}, ValueError, "type must be 'mixed', 1 or 2, got 'II'"),
        ({"mixing": 0.0}, ValueError, r"mixing must be in \(0, 1\], got 0.0"),
        ({"mixing": 1.5}, ValueError, r"mixing must be in \(0, 1\], got 1.5"),
        ({"mixing": float("nan")}, ValueError, r"mixing must be in \(0, 1\], got nan"),
        ({"mixing": "1"}, TypeError, "mixing must be"),
        ({"ridge": -1e-3}, ValueError, r"ridge must be in \[0, 1\), got -0.001"),
        ({"ridge": 1.0}, ValueError, r"ridge must be in \[0, 1\), got 1.0"),
        ({"ridge": "small"}, TypeError, "ridge must be"),
        ({"history_dtype": torch.int32}, ValueError, "history_dtype must be None or one of"),
        ({"history_dtype": "bfloat16"}, ValueError, "got 'bfloat16'; did you mean torch.bfloat16, without quotes"),
        ({"history_dtype": "torch.int8"}, ValueError, "did you mean torch.int8, without quotes"),
        ({"history_dtype": "int4"}, ValueError, "history_dtype must be None or one of .* got 'int4'$"),
        ({"type": torch.tensor(2)}, ValueError, r"type must be 'mixed', 1 or 2, got tensor\(2\)"),
        ({"type": [2]}, ValueError, r"type must be 'mixed', 1 or 2, got \[2\]"),
        ({"evict": "newest"}, ValueError, "evict must be 'least_useful' or 'oldest', got 'newest'"),
        ({"beta": 0.5}, TypeError, "beta"),
    ],
    ids=str,
)
def test_wrong_option_raises_with_its_name(wrong, error, message):
    with pytest.raises(error, match=message):
        dq.Anderson(**wrong)


def test_float64_history_of_a_narrower_state_raises():
    with pytest.raises(ValueError, match=r"history_dtype=torch.float64 needs a float64 state, got torch.float32"):
        dq.Anderson(history_dtype=torch.float64).init(torch.zeros(2, 3))


def test_options_are_immutable_values():
    solver = dq.Anderson()
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.m = 3  # type: ignore[misc]
    assert solver == dq.Anderson()
    assert hash(solver) == hash(dq.Anderson())
    assert solver != dq.Anderson(m=3)


def test_history_of_the_default_takes_two_bytes_a_number_of_narrow_states():
    for dtype, expected in (
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.float64, torch.float64),
    ):
        state = dq.Anderson(m=3).init(torch.zeros(2, 50, dtype=dtype))
        assert state.ws.history.dtype == expected
        assert state.ws.history.shape == (2, 2, 3, 50)
