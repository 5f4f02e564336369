"""The joint step agrees with float64, whatever the backend, the blocks, the projection and the dtypes."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from problems import BACKENDS, DEVICE, EPS, bits, same_bits, threads
from torch import Tensor

import deqfast as dq
from deqfast import ops
from deqfast.ops.anderson import AndersonWorkspace
from deqfast.ops.codes import BLOCKS, Int, Real
from deqfast.ops.joint import JointWorkspace, MapOptions, Part
from deqfast.ops.plain.joint import joint_map
from deqfast.ops.joint_step import JointStep
from deqfast.ops.layout import Layout, accumulation_dtype, real_dtype
from deqfast.ops.workspace import Stopping
from deqfast.status import Status

F64, F32, BF16, F16, I8 = torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8
RULES = [(1e-3, 0.0, 1.0)] * 3
DAMPING = (0.8, 0.6)
PROJECTIONS = {
    "none": {},
    "undamped": {"damping": (1.0, 1.0)},
    "box": {"low": 0.1, "high": 0.6},
    "l2": {"ball": "l2", "radius": 0.7},
    "l2-centre": {"ball": "l2", "radius": 0.7, "center": True},
    "l2-wide": {"ball": "l2", "radius": 1e3, "center": True},
    "linf": {"ball": "linf", "radius": 0.2},
    "linf-box": {"ball": "linf", "radius": 0.2, "low": 0.1, "high": 0.6, "center": True},
    "normalised": {"normalize": True},
    "normalised-l2": {"normalize": True, "ball": "l2", "radius": 0.4, "center": True},
}


@dataclasses.dataclass
class Start:
    """(z, mu, x) as lists of tensors and the centre of a ball around x."""

    z: list[Tensor]
    mu: list[Tensor]
    x: list[Tensor]
    center: list[Tensor] | None = None

    def every(self) -> list[Tensor]:
        return [*self.z, *self.mu, *self.x]

    def change(self, use: Any) -> Start:
        lists = [None if part is None else [use(t) for t in part] for part in (self.z, self.mu, self.x, self.center)]
        return Start(*lists)  # type: ignore[arg-type]

    def to(self, dtype: torch.dtype) -> Start:
        return self.change(lambda t: t.to(torch.complex128 if t.is_complex() and dtype == F64 else dtype))


def random(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7 * sum(shape))
    double = torch.complex128 if dtype.is_complex else F64
    return torch.randn(*shape, dtype=double, generator=generator, device="cpu").to(DEVICE, dtype)


def start(B: int, nz: int, nx: int, dtype: torch.dtype = F32, center: bool = False) -> Start:
    return Start(
        [random(B, nz, dtype=dtype, seed=1)],
        [random(B, nz, dtype=dtype, seed=2)],
        [random(B, nx, dtype=dtype, seed=3)] if nx else [],
        [random(B, nx, dtype=dtype, seed=4)] if center else None,
    )


def workspace(
    at: Start,
    solver: Any = None,
    accelerate: tuple[str, ...] = BLOCKS,
    rules: list[tuple[float, float, float]] | None = None,
    max_iter: int = 0,
    **options: Any,
) -> JointWorkspace:
    """A workspace that stands at ``at``, as a joint solve would make it."""
    options.pop("center", None)
    every = at.every()
    kinds = [0] * len(at.z) + [1] * len(at.mu) + [2] * len(at.x)
    chosen = [i for i, kind in enumerate(kinds) if BLOCKS[kind] in accelerate]
    layout = Layout(every, "start")
    solver = solver or dq.Picard()
    core = solver.workspace(Layout([every[i] for i in chosen], "start"), Stopping(0.0, max_iter=max_iter))
    core.judge_blocks((rules or RULES)[: 3 if at.x else 2])
    centers = [None] * (len(at.z) + len(at.mu)) + (at.center or [None] * len(at.x))
    parts = [
        Part(
            kind,
            layout.leaves[i],
            chosen.index(i) if i in chosen else None,
            None if centers[i] is None else layout.leaves[i].rows(centers[i]).to(layout.acc).contiguous(),
        )
        for i, kind in enumerate(kinds)
    ]
    ws = JointWorkspace(core, parts, MapOptions(**{"damping": DAMPING, **options}))
    for i, t in enumerate(every):
        ws.value(i, 0).copy_(t)
        for buffer in ws.mapped:
            buffer[i].fill_(7)
    return ws


def given(at: Start, seed: int = 10) -> list[Tensor]:
    """Values of f, p and q near the iterate."""
    return [t + 0.1 * random(*t.shape, dtype=t.dtype, seed=seed + i) for i, t in enumerate(at.every())]


def rows(ws: JointWorkspace, leaves: list[Tensor]) -> list[Tensor]:
    return [part.leaf.rows(t).double() for part, t in zip(ws.parts, leaves, strict=True)]


def check_map(at: Start, backend: str, values: list[Tensor] | None = None, step_size: float = 0.3, **options) -> None:
    """The mapped state and the norms are those of float64, up to rounding."""
    values = given(at) if values is None else values
    ws, oracle = workspace(at, **options), workspace(at.to(F64), **options)
    ops.choose(backend, DEVICE).joint(ws).map(values, step_size, None)
    joint_map(oracle, [t.to(torch.complex128 if t.is_complex() else F64) for t in values], step_size)
    own = [*rows(ws, at.every())], [*rows(ws, values)]
    dtype = ws.core.layout.dtype
    acc, B = EPS[accumulation_dtype(dtype)], ws.core.layout.B
    size = torch.zeros(3, B, dtype=F64)
    pairs = zip(rows(ws, ws.mapped[0]), rows(oracle, oracle.mapped[0]), *own, strict=True)
    for part, (got, expected, v, f) in zip(ws.parts, pairs, strict=True):
        scale = v.abs() + f.abs() * (1 + step_size) + 1
        size[part.block] += scale.square().sum(1)
        # A change of the factor in a norm moves a whole row: hence the second term.
        bound = 8 * acc * (scale + v.norm(dim=1, keepdim=True) * 0.01) + EPS[dtype] * expected.abs()
        if dtype == F16:
            bound = bound + 2.0**-24
        assert bool(((got - expected).abs() <= bound).all()), BLOCKS[part.block]
    got, expected = (w.core.block_norms[:, :, :B] for w in (ws, oracle))
    bound = 8 * acc * size.sqrt()[: got.shape[0], None]
    assert bool(((got - expected).abs() <= bound).all()), (got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize(("B", "nz", "nx"), [(3, 33, 9), (1, 1, 1), (2, 20001, 100)])
def test_map_agrees_with_float64(B, nz, nx, projection, backend):
    options = PROJECTIONS[projection]
    check_map(start(B, nz, nx, center=options.get("center", False)), backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16, torch.complex64, torch.complex128])
@pytest.mark.parametrize("projection", ["none", "normalised-l2", "linf-box"])
def test_map_agrees_for_all_dtypes(dtype, projection, backend):
    options = PROJECTIONS[projection]
    at = start(3, 1030, 17, dtype=dtype, center=options.get("center", False))
    check_map(at, backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("B", "nz", "nx"), [(17, 8, 3), (17, 1000, 1), (1, 70_000, 64), (2, 3, 70_000), (3, 5, 0)])
def test_map_agrees_for_all_sizes(B, nz, nx, backend):
    options = PROJECTIONS["normalised-l2" if nx else "none"]
    check_map(start(B, nz, nx, center=bool(nx)), backend, **options)


def tree(B: int = 2) -> Start:
    """Several tensors in every block: channels_last, complex, without numbers, with a dimension of one."""
    image = functools.partial(random, B, 3, 4, 5)

    def block(seed: int) -> list[Tensor]:
        channels_last = image(seed=seed).to(memory_format=torch.channels_last)
        return [channels_last, random(B, 7, dtype=torch.complex64, seed=seed), torch.zeros(B, 0), random(B, seed=seed)]

    return Start(block(1), block(2), [image(seed=3), random(B, 6, 1, seed=3)], [image(seed=4), random(B, 6, 1, seed=4)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("projection", ["none", "normalised-l2", "linf-box"])
def test_trees_are_read_in_any_memory_order(projection, backend):
    at = tree()
    values = given(at)
    values[0] = values[0].contiguous()  # the state is channels_last
    values[1] = torch.stack([values[1].conj(), values[1]], dim=2)[:, :, 0].conj()
    values[8] = values[8].to(memory_format=torch.channels_last)
    values[9] = torch.cat([values[9], values[9]], dim=1)[:, ::2]
    check_map(at, backend, values, **PROJECTIONS[projection])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "narrow"), [(F32, BF16), (F32, F16), (F64, F32), (F64, BF16)])
def test_narrower_values_are_read(dtype, narrow, backend):
    at = start(3, 40, 6, dtype=dtype)
    check_map(at, backend, [t.to(narrow) for t in given(at)], **PROJECTIONS["normalised"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_value_is_read(backend):
    at = start(3, 40, 6)
    values = [t[:1].expand_as(t) for t in given(at)]
    check_map(at, backend, values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nz", [40, 20001])
def test_stopped_samples_are_left_alone(nz, backend):
    at = start(4, nz, 6, center=True)
    ws = workspace(at, **PROJECTIONS["normalised-l2"])
    ws.core.int_row(Int.STATUS)[1] = Status.CONVERGED
    ws.core.block_norms.fill_(-1)
    ops.choose(backend, DEVICE).joint(ws).map(given(at), 0.3, None)
    running = [0, 2, 3]
    assert bool((ws.core.block_norms[:, :, 1] == -1).all())
    assert bool((ws.core.block_norms[:, :, running] > 0).all())
    for mapped in ws.mapped[0]:
        assert bool((mapped[1] == 7).all())
        assert not bool((mapped[running] == 7).any())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_sample_is_unaffected_by_a_neighbour_that_is_no_number(bad, projection, backend):
    options = PROJECTIONS[projection]
    at = start(3, 40, 6, center=options.get("center", False))
    clean = given(at)
    for i in range(3):
        values = [t.clone() for t in clean]
        values[i][1, 2] = bad
        with_bad, without = workspace(at, **options), workspace(at, **options)
        ops.choose(backend, DEVICE).joint(with_bad).map(values, 0.3, None)
        ops.choose(backend, DEVICE).joint(without).map(clean, 0.3, None)
        for block in range(3):
            finite = torch.isfinite(with_bad.core.block_norms[block, :, :3]).all(0)
            expected = [True, block != i or (bad == math.inf and i == 2 and clipped(options)), True]
            assert finite.tolist() == expected, (i, block)
        others = [0, 2]
        assert same_bits([t[others] for t in with_bad.mapped[0]], [t[others] for t in without.mapped[0]])
        assert same_bits(with_bad.core.block_norms[:, :, others], without.core.block_norms[:, :, others])


def clipped(options: dict[str, Any]) -> bool:
    """Whether an infinite gradient leads to a point of the set's boundary."""
    return not options.get("normalize") and ("low" in options or options.get("ball") == "linf")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("nz", "nx"), [(40, 9), (9000, 700), (5, 33000)])
def test_sample_has_the_same_bits_in_any_batch(nz, nx, backend):
    at = start(5, nz, nx, center=True)
    values = given(at)
    options = PROJECTIONS["normalised-l2"]
    together, apart = workspace(at, **options), workspace(at.change(lambda t: t[3:4].clone()), **options)
    ops.choose(backend, DEVICE).joint(together).map(values, 0.3, None)
    ops.choose(backend, DEVICE).joint(apart).map([t[3:4].clone() for t in values], 0.3, None)
    assert same_bits([t[3:4] for t in together.mapped[0]], apart.mapped[0])
    assert same_bits(together.core.block_norms[:, :, 3], apart.core.block_norms[:, :, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_change_no_bit(backend):
    at = start(3, 20000, 9000, center=True)
    found = []
    for count in (1, 2, 3):
        with threads(count):
            ws = workspace(at, **PROJECTIONS["normalised-l2"])
            ops.choose(backend, DEVICE).joint(ws).map(given(at), 0.3, None)
            found.append((ws.mapped[0], ws.core.block_norms))
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    at = start(0, 5, 3)
    ops.choose(backend, DEVICE).joint(workspace(at, **PROJECTIONS["normalised-l2"])).map(at.every(), 0.1, None)
    assert JointStep(workspace(at, dq.Anderson(m=2)), ops.choose(backend, DEVICE))(at.every(), 0.1) == 0


# ---- the whole step ----


def joint_f(leaves: list[Tensor], n: int) -> list[Tensor]:
    """f, p and q of a smooth contraction that couples the blocks, of n tensors in z; rows are independent."""
    z, mu, x = leaves[:n], leaves[n : 2 * n], leaves[2 * n :]
    drive = sum(mean(t) for t in x) if x else 0.0
    found = []
    for t in z:
        found.append(0.5 * t.roll(1, -1) / (1 + t.abs()) + like(drive, t) + 0.2)
    for t, s in zip(mu, z, strict=True):
        found.append(0.4 * t.roll(-1, -1) - 0.3 * t / (1 + s.abs()) + s)
    pull = sum(mean(t) for t in mu)
    return found + [0.7 * t + 0.3 * like(pull, t) for t in x]


def mean(t: Tensor) -> Tensor:
    return t.flatten(1).sum(1) / max(1, t[0].numel())


def like(value: Any, t: Tensor) -> Any:
    return value.view(-1, *[1] * (t.dim() - 1)) if isinstance(value, Tensor) else value


def drive(ws: JointWorkspace, backend: str, steps: int, step_size: float = 0.2) -> list[Tensor]:
    step = JointStep(ws, ops.choose(backend, DEVICE))
    n = sum(part.block == 0 for part in ws.parts)
    for _ in range(steps):
        step(joint_f([ws.value(i) for i in range(len(ws.parts))], n), step_size)
    return [ws.value(i) for i in range(len(ws.parts))]


SOLVERS = {
    "mixed": dq.Anderson(m=3, history_dtype=F32),
    "type-1": dq.Anderson(m=3, type=1, history_dtype=F32),
    "type-2": dq.Anderson(m=3, type=2, history_dtype=F32),
    "mixed-bf16": dq.Anderson(m=3, history_dtype=BF16),
    "mixed-f16": dq.Anderson(m=3, history_dtype=F16),
    "type-2-int8": dq.Anderson(m=3, type=2, history_dtype=I8),
    "mixing": dq.Anderson(m=3, mixing=0.7, history_dtype=F32),
    "picard": dq.Picard(),
}


def check_step(
    solver: Any, at: Start, backend: str, steps: int = 5, accelerate: tuple[str, ...] = BLOCKS, **options: Any
) -> None:
    """A few whole steps end as near to float64 as the reference's in the same dtype, and with the same record."""
    if isinstance(solver, dq.Anderson):
        solver = dataclasses.replace(solver, ridge=1e-3)
    common = {"solver": solver, "accelerate": accelerate, "rules": [(0.0, 0.0, 1.0)] * 3, **options}
    ws, peer, oracle = workspace(at, **common), workspace(at, **common), workspace(at.to(F64), **common)
    results = [drive(ws, backend, steps), drive(peer, "reference", steps), drive(oracle, "reference", steps)]
    got, beside, expected = (torch.cat(rows(w, r), dim=1) for w, r in zip((ws, peer, oracle), results, strict=True))
    eps = EPS[real_dtype(at.z[0].dtype)]
    history = ws.core.history.dtype if isinstance(ws.core, AndersonWorkspace) and ws.core.method.m else F64
    ulp = 1e-2 if history in (BF16, F16, I8) else 0  # a column that rounds the other way
    error, own = (got - expected).norm(dim=1), (beside - expected).norm(dim=1)
    assert bool((error <= 30 * own + (100 * eps + ulp) * expected.norm(dim=1)).all()), (error, own)
    for row in (Int.STATUS, Int.STEPS, Int.COUNT):
        assert torch.equal(ws.core.int_row(row), oracle.core.int_row(row)), row.name
    residual = ws.core.real_row(Real.RESIDUAL).double(), oracle.core.real_row(Real.RESIDUAL)
    assert torch.allclose(*residual, rtol=0.05 + 10 * ulp + 10 * eps, atol=100 * eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize(("B", "nz", "nx"), [(3, 33, 9), (2, 9000, 50)])
def test_step_agrees_with_float64(B, nz, nx, solver, backend):
    check_step(solver, start(B, nz, nx), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "solver", [SOLVERS["mixed"], SOLVERS["type-2"], SOLVERS["picard"]], ids=["mixed", "2", "picard"]
)
@pytest.mark.parametrize("dtype", [F64, BF16, F16])
def test_step_agrees_for_other_dtypes(dtype, solver, backend):
    check_step(solver, start(3, 33, 9, dtype=dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("accelerate", [("z", "mu"), ("z",), ("x",), ("mu", "x")], ids="-".join)
def test_blocks_left_out_move_to_their_mapped_value(accelerate, backend):
    for nz in (6, 33):
        check_step(SOLVERS["mixed"], start(3, nz, 9), backend, accelerate=accelerate, ball="l2", radius=3.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_of_trees_agrees(backend):
    at = tree()
    at = Start([at.z[0], at.z[2]], [at.mu[0], at.mu[2]], at.x, at.center)
    check_step(SOLVERS["mixed"], at, backend, ball="linf", radius=2.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("accelerate", [BLOCKS, ("z",)], ids="-".join)
@pytest.mark.parametrize("nz", [6, 40, 9000])
def test_sample_stops_when_every_block_is_within_its_tolerance(nz, accelerate, backend):
    """Sample 0 moves nowhere, samples 1 to 3 in one block only, sample 4 in all, sample 5 within the tolerances."""
    at = start(6, nz, 9)
    values = [t.clone() for t in at.every()]
    values[2].zero_()  # a gradient: x stays
    for block, value in enumerate(values):
        for b in (1 + block, 4):
            value[b] += 0.5 * at.every()[block][b]
    values[0][5] *= 1 + 1e-3
    values[1][5] *= 1 + 1e-4
    rules = [(2e-3, 0.0, 0.05), (2e-4, 0.0, 0.5), (1e-4, 0.0, 1.0)]
    ws = workspace(at, dq.Anderson(m=2), accelerate, rules)
    assert JointStep(ws, ops.choose(backend, DEVICE))(values, 0.3) >= 4  # a GPU tells late
    status = ws.core.int_row(Int.STATUS).tolist()
    running, done = int(Status.RUNNING), int(Status.CONVERGED)
    assert status == [done, running, running, running, running, done]
    norms = ws.core.block_norms[:, :, :6]
    weighted = (norms[:, 0] / norms[:, 1]) * torch.tensor([rule[2] for rule in rules], dtype=F64)[:, None]
    assert torch.allclose(ws.core.real_row(Real.RESIDUAL).double(), weighted.amax(0), rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_absolute_tolerance_of_a_block(backend):
    at = start(2, 12, 5)
    values = [t.clone() for t in at.every()]
    values[2].zero_()
    values[1] += 0.01
    for atol, status in ((0.01, Status.RUNNING), (0.05, Status.CONVERGED)):
        ws = workspace(at, dq.Anderson(m=2), rules=[(1e-6, 0.0, 1.0), (0.0, atol, 1.0), (1e-6, 0.0, 1.0)])
        JointStep(ws, ops.choose(backend, DEVICE))(values, 0.3)
        assert ws.core.int_row(Int.STATUS).tolist() == [int(status)] * 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("accelerate", [BLOCKS, ("z", "mu")], ids="-".join)
@pytest.mark.usefixtures("poisoned_memory")
def test_sample_that_is_no_number_in_one_block_stops_alone(accelerate, backend):
    at = start(3, 20, 6)
    clean = given(at)
    for i in range(3):
        values = [t.clone() for t in clean]
        values[i][1, 0] = math.nan
        ws, without = (workspace(at, dq.Anderson(m=2), accelerate) for _ in range(2))
        JointStep(ws, ops.choose(backend, DEVICE))(values, 0.3)
        JointStep(without, ops.choose(backend, DEVICE))(clean, 0.3)
        assert ws.core.int_row(Int.STATUS).tolist() == [Status.RUNNING, Status.NON_FINITE, Status.RUNNING]
        for j in range(3):
            assert bool(torch.isfinite(ws.value(j)).all())
            assert torch.equal(bits(ws.value(j)[[0, 2]]), bits(without.value(j)[[0, 2]]))
