"""The Triton kernels, run by Triton's interpreter, agree with the formulas, with float64 and with the reference.

Collected only when named: it needs TRITON_INTERPRET=1 before the kernels are loaded, see test_triton.py. The
interpreter takes tens of milliseconds a sample and step, hence the small batches.
"""

from __future__ import annotations

import pytest
import test_anderson
import test_blind_spot
import test_broyden
import test_mix_every
import torch
from interpreter import patch_once
from problems import problem, pull, run, same_bits, same_state, solve

import deqfast as dq
from deqfast import ops
from deqfast.kernels import shapes
from deqfast.ops.broyden import BroydenWorkspace
from deqfast.ops.codes import Int

patch_once()
# NumPy warns of what is masked out afterwards.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
F64, F32, BF16, F16, I8 = torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8
anderson = test_anderson.options


@pytest.fixture
def small_chunks(monkeypatch):
    """Programs share samples of more than 1024 numbers, in chunks of as many."""
    monkeypatch.setattr(shapes, "SAMPLE_MAX_N", 1024)
    monkeypatch.setattr(shapes, "CHUNK", 1024)


def test_interpreter_serves_the_cpu_by_name_alone():
    cpu = torch.device("cpu")
    assert ops.why_not("triton", cpu) is None
    assert ops.choose("triton", cpu).name == "triton"
    assert ops.choose("auto", cpu).name != "triton"


@pytest.mark.parametrize(
    ("solver", "B", "N", "steps"),
    [
        (anderson(m=5), 2, 40, 8),
        (anderson(m=1), 1, 63, 4),
        (anderson(m=10), 1, 17, 13),
        (anderson(m=5, type=1, mixing=0.7), 1, 63, 8),
        (anderson(m=3, type=1), 3, 3, 5),
        (anderson(m=4, type=2, evict="oldest"), 1, 20, 7),
        (anderson(m=4, type=2, mixing=0.7), 1, 1000, 6),
        (anderson(m=5, type=2), 1, 8, 7),
        (anderson(m=5), 1, 8, 7),
        (anderson(m=4), 1, 9, 6),
        (anderson(m=3), 3, 1, 4),
    ],
    ids=str,
)
def test_anderson_step_agrees_with_float64_formulas(solver, B, N, steps):
    test_anderson.check_step(solver, F32, B, N, "triton", steps)


@pytest.mark.parametrize(("name", "N"), [("mixed-2-5", 40), ("1-3-7", 11), ("2-2-5", 40), ("oldest", 63)])
def test_anderson_mixes_every_few_evaluations(name, N):
    test_mix_every.check_against_samples(test_mix_every.SOLVERS[name], 1, N, "triton", 9)


@pytest.mark.parametrize("N", [4, 20])
def test_turned_columns_are_those_of_the_formula(N):
    assert test_blind_spot.turned_columns(N, "triton") > 0


@pytest.mark.parametrize(
    ("history", "state"),
    [(F64, F64), (BF16, F64), (I8, F64), (F16, F32), (I8, F32), (BF16, BF16), (I8, F16), (F32, torch.complex64)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["mixed", 2])
def test_anderson_step_agrees_for_all_dtypes(history, state, kind):
    test_anderson.check_step(anderson(m=3, type=kind, history_dtype=history), state, 1, 550, "triton", 4)


@pytest.mark.parametrize(
    ("solver", "state"),
    [
        (anderson(m=2), F32),
        (anderson(m=2, type=2, mixing=0.7, history_dtype=I8), BF16),
    ],
    ids=str,
)
def test_anderson_step_agrees_where_programs_share_a_sample(solver, state):
    test_anderson.check_step(solver, state, 1, 8195, "triton", 4)


@pytest.mark.parametrize(
    ("solver", "state", "B", "N", "steps"),
    [
        (dq.Broyden(memory=2), F32, 2, 40, 7),
        (dq.Broyden(memory=20), F32, 1, 63, 7),
        (dq.Broyden(memory=20, scale="first_step"), F32, 2, 1000, 6),
        (dq.Broyden(memory=4), F64, 2, 1, 6),
        (dq.Broyden(memory=4), F64, 1, 33, 6),
        (dq.Broyden(memory=4), BF16, 2, 33, 6),
        (dq.Broyden(memory=4), F16, 1, 33, 6),
        (dq.Broyden(memory=4), torch.complex64, 1, 33, 6),
        (dq.Broyden(memory=3, scale="first_step"), F32, 1, 8200, 6),
        (dq.Broyden(memory=2), F32, 1, 65536, 4),  # the memory is full once
    ],
    ids=str,
)
def test_broyden_step_agrees_with_float64_formulas(solver, state, B, N, steps):
    test_broyden.check_step(solver, state, B, N, "triton", steps)


@pytest.mark.parametrize("scale", ["unit", "first_step"])
@pytest.mark.parametrize("N", [1100, 5003])
def test_gram_form_of_broyden_agrees(scale, N, small_chunks, monkeypatch):
    monkeypatch.setattr(BroydenWorkspace, "GRAM_MIN_N", 1024)
    solver = dq.Broyden(memory=2, scale=scale)
    test_broyden.check_step(solver, F32, 1, N, "triton", 4)


@pytest.mark.parametrize(
    "assert_that",
    [
        test_anderson.test_growth_of_a_type_2_residual_keeps_the_newest_column_alone,
        test_anderson.test_failed_small_solve_takes_a_plain_step_and_forgets_that_sample_alone,
        test_anderson.test_overflowing_step_takes_a_plain_step,
        test_broyden.test_vanishing_denominator_restarts_that_sample_alone,
        test_broyden.test_scale_is_measured_on_the_first_step_within_its_limits,
    ],
    ids=lambda claim: claim.__name__,
)
def test_claim_about_every_backend_holds(assert_that):
    assert_that("triton")


SOLVERS = {
    "mixed": dq.Anderson(m=3, history_dtype=F32),
    "type-2": dq.Anderson(m=3, type=2, history_dtype=F32),
    "broyden": dq.Broyden(memory=3),
    "picard": dq.Picard(damping=0.7),
}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def agree(p, **options):
    """Solves by both backends: same steps and statuses, and answers as near as the tolerance asks for."""
    got, expected = (solve(p, **{"rtol": 1e-4, "backend": name, **options}) for name in ("triton", "reference"))
    assert torch.equal(got.status, expected.status)
    assert bool(((got.steps - expected.steps).abs() <= 1).all())
    return got, expected


@every_solver
def test_trees_and_strided_outputs_are_read_where_they_lie(solver):
    """A channels_last tensor whose f comes back in another order, a complex one, and one without numbers."""
    z0 = {
        "image": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "none": torch.zeros(2, 0),
        "wave": torch.zeros(2, 7, dtype=torch.complex64),
    }
    x = {"image": torch.randn(2, 3, 4, 5), "none": torch.zeros(2, 0), "wave": torch.randn(2, 7, dtype=torch.complex64)}

    def f(z):
        image, wave = 0.4 * z["image"] + x["image"], 0.3j * z["wave"] + x["wave"]
        padded = torch.stack([wave.conj().resolve_conj(), wave], dim=2)
        return {"image": image.contiguous(), "none": z["none"] * 1, "wave": padded[:, :, 0].conj()}

    states = [solver.init(z0, rtol=1e-4, backend=name) for name in ("triton", "reference")]
    for _ in range(4):
        values = [f(state.z) for state in states]
        for state, value in zip(states, values, strict=True):
            state.step(value)
        assert torch.equal(states[0].ws.int_row(Int.STATUS), states[1].ws.int_row(Int.STATUS))
        for name in ("image", "wave"):
            assert torch.allclose(states[0].z[name], states[1].z[name], rtol=1e-5, atol=1e-5)


@every_solver
def test_narrow_output_of_autocast_and_misaligned_output_are_read(solver):
    p = problem(2, 33)
    states = [solver.init(p.z0, rtol=0.0, max_iter=4, backend=name) for name in ("triton", "reference")]
    while not states[0].done:
        f = pull(states[1].z, *p.args)
        f = f.bfloat16() if states[0].nfe == 2 else torch.cat([f, f], dim=1)[:, 33:]
        for state in states:
            with torch.autocast("cpu", dtype=BF16):
                state.step(f.clone() if f.is_contiguous() else f)
        assert torch.allclose(states[0].z, states[1].z, rtol=1e-5, atol=1e-5)


@every_solver
def test_sample_has_the_same_bits_in_any_batch_and_beside_nan(solver):
    p = problem(17 if solver is SOLVERS["mixed"] else 8, 9)
    p.x[4] = torch.nan
    p.x[6] = torch.inf
    together = solve(p, solver=solver, backend="triton", max_iter=4)
    for rows in (slice(3, 4), slice(7, 9)):
        apart = solve(p.rows(rows), solver=solver, backend="triton", max_iter=4)
        for name in ("z", "residual", "steps", "status"):
            assert same_bits(getattr(apart, name), getattr(together, name)[rows]), name
    assert int(together.status[4]) == int(together.status[6]) == dq.Status.NON_FINITE
    assert bool(torch.isfinite(together.z).all())


@pytest.mark.parametrize("solver", [SOLVERS["mixed"], SOLVERS["broyden"]], ids=["mixed", "broyden"])
def test_large_sample_has_the_same_bits_in_any_batch(solver, small_chunks):
    p = problem(2, 2200)
    together = solve(p, solver=solver, backend="triton", max_iter=3)
    apart = solve(p.rows(slice(1, 2)), solver=solver, backend="triton", max_iter=3)
    assert same_bits(apart.z, together.z[1:])


@pytest.mark.parametrize("solver", [SOLVERS["type-2"], SOLVERS["broyden"]], ids=["type-2", "broyden"])
def test_compacted_solve_has_the_bits_of_the_whole_one(solver):
    p = problem(4, 12, slowest=0.9)
    whole, compact = (
        solve(p, solver=solver, backend="triton", rtol=1e-3, compact=choice) for choice in (False, (True, True))
    )
    assert same_bits(whole.z, compact.z)
    assert torch.equal(whole.steps, compact.steps)


def test_answers_and_labels_of_samples_out_of_evaluations_are_the_references():
    p = problem(3, 20, slowest=0.99)
    rate = torch.tensor([0.5, 0.99, -1.2])[:, None]

    def f(z, x, _):
        return rate * z + x

    for solver in (dq.Picard(), SOLVERS["type-2"]):
        for returns in ("best", "last"):
            got, expected = agree(p, f=f, solver=solver, max_iter=7, returns=returns)
            assert torch.allclose(got.z, expected.z, rtol=1e-3, atol=1e-3)
            assert torch.allclose(got.residual, expected.residual, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_samples_of_any_magnitude_have_a_unit(size):
    p = problem(1, 20)
    p.x *= size

    def f(z, x, rate):
        return rate * z + x

    got, _ = agree(p, f=f, solver=dq.Anderson(m=3), rtol=1e-3)
    assert bool(got.converged.all())


@pytest.mark.parametrize("solver", [SOLVERS["mixed"], SOLVERS["broyden"]], ids=["mixed", "broyden"])
def test_solve_saved_by_one_backend_goes_on_in_the_other(solver):
    p = problem(2, 24)
    settings = {"rtol": 0.0, "max_iter": 6}
    triton, reference, again = (
        solver.init(p.z0, backend=name, **settings) for name in ("triton", "reference", "triton")
    )
    run(triton, lambda z: pull(z, *p.args), 4)
    for state in (reference, again):
        state.load_state_dict(triton.state_dict())
    for state in (triton, reference, again):
        run(state, lambda z: pull(z, *p.args))
    assert same_state(triton, again)
    assert torch.allclose(triton.z, reference.z, rtol=1e-4, atol=1e-5)


# ---- the joint step ----
