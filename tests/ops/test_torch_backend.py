"""Backend "torch": few operations, none that a device may lack, no wait for the device, and the oracle's answers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from problems import EVERY_SOLVER, linear, problem, pull, rows_of, solve
from quadratics import LinearQuadratic
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves as leaves

import deqfast as dq
from deqfast import ops
from deqfast.ops import lag, layout, native, plain
from deqfast.ops.codes import Int
from deqfast.ops.plain import matrices
from deqfast.ops.plain.elimination import forward_substitution, gauss_jordan
from deqfast.ops.plain.portable import PortableStep

pytestmark = pytest.mark.host

MISSING = ("linalg", "cholesky", "frexp", "ldexp", "triangular", "lu_", "inverse", "scatter_reduce")


class Operations(TorchDispatchMode):
    """Counts what reaches the dispatcher, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Poor(TorchDispatchMode):
    """A device without float64 and without what some devices lack."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(part in name for part in MISSING) and "linalg_vector_norm" not in name:
            raise NotImplementedError(f"{name} is not implemented for this device")
        found = func(*args, **(kwargs or {}))
        for t in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(t, Tensor) and t.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"this device has no float64, which {name} makes")
        return found


@contextlib.contextmanager
def poor_device() -> Iterator[None]:
    """The CPU as such a device: what was found out about it is forgotten before and after."""
    caches = (matrices.has_linalg, layout._widest)
    for cache in caches:
        cache.cache_clear()
    try:
        with Poor():
            yield
    finally:
        for cache in caches:
            cache.cache_clear()


@pytest.mark.parametrize(
    ("solver", "most", "most_frozen"),
    [(dq.Anderson(), 98, 114), (dq.Anderson(m=6, type=2, history_dtype=torch.float32), 85, 107), (dq.Picard(), 33, 48)],
    ids=["default", "like-for-like", "Picard"],
)
@pytest.mark.parametrize("N", [5, 64])
def test_operations_of_a_step_are_few(solver, most, most_frozen, N):
    p = problem(4, N, slowest=0.9999)
    state = solver.init(p.z0, rtol=0.0, max_iter=30, backend="torch")
    frozen = 0
    for k in range(20):
        f = pull(state.z, *p.args)
        before = state.status.clone()
        with Operations() as seen:
            state.step(f)
        if k and torch.equal(before, state.status):  # the first, and one at which a sample stops, take more
            assert seen.names.total() <= (most_frozen if before.any() else most), seen.names
            frozen += bool(before.any())
    assert frozen


def test_operations_of_a_broyden_step_do_not_grow():
    p = problem(4, 400, slowest=0.9999)
    state = dq.Broyden(memory=30).init(p.z0, rtol=0.0, backend="torch")
    counts = []
    while not bool(state.status.any()):  # until the first has no residual left
        f = pull(state.z, *p.args)
        with Operations() as seen:
            state.step(f)
        counts.append(seen.names.total())
    assert len(counts) > 11 and counts[-2] == counts[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_solves_converge_without_float64_and_linalg(solver, dtype):
    p = problem(5, 40, dtype=dtype, slowest=0.6)
    with poor_device():
        assert not matrices.has_linalg("cpu")
        state = solver.init(p.z0, max_iter=100, backend="torch")
        while not state.done:
            state.step(pull(state.z, *p.args))
    assert bool((state.status == dq.Status.CONVERGED).all())
    assert bool((state.ws.int_row(Int.SOLVE_FALLBACKS) == 0).all())


@pytest.mark.parametrize("project", [None, dq.project.L2Ball(0.5)], ids=["free", "ball"])
def test_joint_solve_converges_without_float64_and_linalg(project):
    q = LinearQuadratic(norm=0.5)
    args = q.tensors(torch.float32)
    step_size = 1 / q.solution(*q.tensors())[1]
    z0, x0 = torch.zeros(q.B, q.nz), torch.zeros(q.B, q.nx)
    options = {"rtol": 1e-3, "max_iter": 300, "step_size": step_size, "backward": "none", "project": project}
    expected = dq.joint_solve(q.f, q.loss, z0, x0, args, backend="reference", **options)
    with poor_device():
        found = dq.joint_solve(q.f, q.loss, z0, x0, args, backend="torch", **options)
    assert bool(found.converged.all())
    assert torch.allclose(found.x, expected.x, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("solver", [dq.Anderson(m=6, history_dtype=torch.float32), dq.Anderson(m=6, type=2)])
def test_iterates_are_the_oracles_up_to_rounding(solver):
    p = problem(5, 300, slowest=0.9)
    p = dataclasses.replace(p, z0=p.z0 + 0.1)
    states = [solver.init(p.z0, rtol=0.0, backend=backend) for backend in ("torch", "reference")]
    for _ in range(8):
        for state in states:
            state.step(pull(state.z, *p.args))
    assert bool((states[0].z - states[1].z).abs().max() <= 2e-6)


@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_answer_of_a_sample_does_not_depend_on_the_batch_up_to_rounding(solver):
    p = problem(19, 33, slowest=0.8)
    options = {"solver": solver, "rtol": 1e-5, "max_iter": 60, "backend": "torch"}
    sol = solve(p, **options)
    for part in ([0], [5, 6], list(range(3, 19))):
        alone = solve(p.rows(part), **options)
        assert torch.allclose(alone.z, sol.z[part], rtol=1e-3, atol=1e-4)
        assert bool(((alone.steps - sol.steps[part]).abs() <= 2).all())


def test_tiles_are_written_when_somebody_asks_and_taken_up_again():
    f, exact = linear(20, 24, norm=0.9)
    states = [dq.Anderson(m=5).init(torch.zeros_like(exact), rtol=0.0, backend="torch") for _ in range(2)]
    for _ in range(12):
        for state in states:
            state.step(f(state.z))
        states[1].state_dict()
    assert torch.allclose(states[0].z, states[1].z, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("atol", [0.0, 1e-2])
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_a_look_at_whether_anything_happens_changes_nothing(solver, atol, dtype):
    p = problem(6, 40, slowest=0.95, dtype=dtype)
    states = [solver.init(p.z0, rtol=1e-3, atol=atol, max_iter=25, backend="torch") for _ in range(2)]
    blind = states[1].bound
    assert isinstance(blind, PortableStep)
    blind.iterates.looks = blind.algebra._looks = blind.statistics.looks = False
    for k in range(25):
        for state in states:
            f = pull(state.z, *p.args)
            if k == 5:
                rows_of(f)[0] *= 1e15  # grows, gets worse, and gets another unit
            if k == 7:
                rows_of(f)[1] = torch.nan
            state.step(f)
        for now, expected in zip(states[0].ws.ints[:, :6], states[1].ws.ints[:, :6], strict=True):
            assert torch.equal(now, expected), k
        assert torch.equal(states[0].ws.reals[:, :6].nan_to_num(7.0), states[1].ws.reals[:, :6].nan_to_num(7.0)), k
        assert all(torch.equal(*pair) for pair in zip(*(leaves(state.z) for state in states), strict=True)), k
    assert bool(states[0].ws.ints[0, :6].any())


# ---- small solves of its own ----


def test_elimination_pivots_and_names_singular_systems():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(7, 6, 6, dtype=torch.float64, generator=generator)
    matrix[1, 0, 0] = 0  # no pivot there
    rhs = torch.randn(7, 6, 2, dtype=torch.float64, generator=generator)
    found, regular = gauss_jordan(matrix, rhs)
    assert bool(regular.all())
    assert torch.allclose(matrix @ found, rhs, rtol=1e-10, atol=1e-10)
    exact = torch.eye(3, dtype=torch.float64)[None].clone()
    exact[0, 2, 2] = 0
    assert gauss_jordan(exact, torch.ones(1, 3, 1, dtype=torch.float64))[1].tolist() == [False]


def test_forward_substitution_solves_triangular_systems():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, 5, 5, dtype=torch.float64, generator=generator).tril() + 3 * torch.eye(5)
    rhs = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    assert torch.allclose((matrix @ forward_substitution(matrix, rhs)[..., None])[..., 0], rhs)


# ---- no wait for the device ----


class Event:
    """Of a device whose work is done when somebody waits for it."""

    waited = 0

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        Event.waited += 1


def test_count_is_read_late_where_the_device_has_events(monkeypatch):
    monkeypatch.setattr(lag, "_events", lambda device_type: Event)
    p = problem(3, 20, slowest=0.5)
    state = dq.Anderson().init(p.z0, rtol=1e-3, backend="torch")
    assert isinstance(state.bound, PortableStep)
    state.bound.iterates.looks = state.bound.algebra._looks = state.bound.statistics.looks = False
    while not state.done:
        f = pull(state.z, *p.args)
        with Operations() as seen:
            ended = state.step(f)
        assert ended or seen.names["aten._local_scalar_dense.default"] <= 1  # of the host's own memory
    assert Event.waited > 0
    surplus = state.nfe - int(state.steps.max())
    assert surplus == lag.LAG
    exact = solve(p, solver=dq.Anderson(), rtol=1e-3, backend="torch")
    assert torch.equal(state.steps, exact.steps) and torch.equal(state.z, exact.z)


def test_device_without_events_is_asked_at_each_step():
    assert lag._events("meta") is None


# ---- who takes it ----


def test_it_is_automatic_where_no_faster_one_serves_and_the_oracle_never_is(monkeypatch):
    monkeypatch.delenv("DEQFAST_BACKEND", raising=False)
    monkeypatch.setattr(native.Native, "why_not", lambda self, device: "not built")
    cpu = torch.device("cpu")
    assert ops.choose("auto", cpu).name == "torch"
    assert not plain.Reference().automatic(cpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_stopped_samples_stay_at_their_answer(solver, dtype):
    p = problem(6, 20, dtype=dtype, slowest=0.9)
    state = solver.init(p.z0, rtol=1e-2, max_iter=30, backend="torch")
    answers: dict[int, Tensor] = {}
    while not state.done:
        state.step(pull(state.z, *p.args))
        for b in range(6):
            if not bool(state.running[b]):
                now = rows_of(state.z)[b]
                assert torch.equal(now, answers.setdefault(b, now))
    assert len(answers) == 6
