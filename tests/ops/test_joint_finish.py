"""The end of a joint step does what the verdict on each sample says, on every backend, to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from joint_step import DAMPING, RULES, Start, random
from joint_step import workspace as step_workspace
from problems import BACKENDS, DEVICE, threads

import deqfast as dq
from deqfast import ops
from deqfast.ops.codes import BLOCKS, Int, Real
from deqfast.ops.joint import JointWorkspace, MapOptions, Part
from deqfast.ops.joint_step import JointStep
from deqfast.ops.layout import Layout
from deqfast.ops.workspace import Stopping
from deqfast.status import Status

pytestmark = pytest.mark.sanitize

MADE = 5
R, C, M, X = Status.RUNNING, Status.CONVERGED, Status.MAX_ITER, Status.NON_FINITE
# What the verdict of evaluation 5 left of each sample: status, evaluations, the one of the best residual, residual,
# best residual, cost, best cost, least residual since the last restart; and what follows: the next iterate of a tensor
# that is not accelerated, whether the sample is saved as best, whether each way of returning takes it, whether the
# safeguard forgets its columns. The answer of "best" is the saved iterate, that of the others the last one.
CASES = [
    # status steps best  now  best  cost  before least    next     save   best  last  cost  forget
    ((R, MADE, MADE, 0.1, 0.1, 3.0, 2.0, 0.4), "mapped", True, True, True, True, False),
    ((R, MADE, 3, 0.5, 0.4, 3.0, 2.0, 0.4), "mapped", False, False, True, False, False),
    ((R, MADE, 3, 0.5, 0.4, 1.0, 2.0, 0.2), "mapped", False, False, True, True, True),
    ((R, MADE, 3, 0.6, 0.4, 1.0, 2.0, 0.4), "mapped", False, False, True, False, False),
    ((R, MADE, 3, 0.9, 0.4, 3.0, 2.0, 0.4), "mapped", False, False, True, False, True),
    ((C, MADE, MADE, 0.1, 0.1, 3.0, 2.0, 0.4), "x", True, True, True, True, False),
    ((M, MADE, MADE, 0.3, 0.3, 1.0, 2.0, 0.3), "x", True, True, True, True, False),
    ((M, MADE, 2, 0.5, 0.4, 1.0, 2.0, 0.4), "answer", False, False, True, True, False),
    ((M, MADE, 2, 0.5, 0.2, 1.0, 2.0, 0.4), "answer", False, False, True, False, False),
    ((X, MADE, 2, math.inf, 0.2, math.nan, 2.0, 0.4), "saved", False, False, False, False, False),
    ((X, MADE, 0, math.inf, math.inf, math.nan, math.nan, math.inf), "x", False, False, False, False, False),
    ((C, 3, 3, 0.1, 0.1, 1.0, 2.0, 0.1), "x", False, False, False, False, False),
    ((X, 4, 2, math.inf, 0.1, 1.0, 2.0, 0.1), "x", False, False, False, False, False),
    ((R, MADE, MADE, 0.2, 0.2, 3.0, math.nan, math.inf), "mapped", True, True, True, True, False),
    ((R, MADE, 3, math.inf, 0.2, 3.0, 2.0, 0.4), "mapped", False, False, True, False, True),
    ((R, MADE, 3, 0.5, 0.4, math.nan, 2.0, 0.4), "mapped", False, False, True, False, False),
]
COLUMN = {"best": 3, "last": 4, "cost": 5}
MANY = 17  # so that a tile of samples is not full


def cases(B: int) -> list[tuple]:
    return [CASES[b % len(CASES)] for b in range(B)]


def workspace(returns, safeguard, dtype, sizes=(33, 9), accelerate=("z", "mu"), B=MANY) -> JointWorkspace:
    """A workspace of a sample for each case, in turn, with numbers of its own in every buffer."""
    nz, nx = sizes
    at = Start(*([random(B, n, dtype=dtype, seed=i)] for i, n in enumerate((nz, nz, nx))))
    layout = Layout(at.every(), "start")
    chosen = [i for i, block in enumerate(BLOCKS) if block in accelerate]
    core = dq.Anderson(m=3).workspace(
        Layout([at.every()[i] for i in chosen], "start"), Stopping(0.0, keep_best=returns == "best")
    )
    core.judge_blocks(RULES)
    parts = [Part(i, leaf, chosen.index(i) if i in chosen else None) for i, leaf in enumerate(layout.leaves)]
    ws = JointWorkspace(core, parts, MapOptions(damping=DAMPING), returns, safeguard)
    buffers = [*core.x[0], *core.x[1], *ws.mapped[0], *ws.mapped[1], *ws.plain[0], *ws.plain[1], *ws.plain_saved]
    buffers += [core.norms, core.block_norms, ws.record.best_norms, *(ws.record.kept or []), ws.record.saved_norms]
    buffers += [ws.record.saved_cost]
    for seed, t in enumerate(buffers):
        if t is not None:
            t.copy_(random(*t.shape, dtype=t.dtype, seed=100 + seed))
    for count, i in ((Int.STATUS, 0), (Int.STEPS, 1), (Int.BEST_STEP, 2)):
        core.int_row(count).copy_(torch.tensor([int(case[0][i]) for case in cases(B)]))
    for row, i in ((Real.RESIDUAL, 3), (Real.BEST, 4)):
        core.real_row(row).copy_(torch.tensor([case[0][i] for case in cases(B)]))
    ws.record.best_cost.copy_(torch.tensor([case[0][6] for case in cases(B)]))
    ws.record.least.copy_(torch.tensor([case[0][7] for case in cases(B)]))
    return ws


def cost_of(ws: JointWorkspace) -> torch.Tensor:
    return torch.tensor([case[0][5] for case in cases(ws.core.layout.B)], dtype=ws.core.layout.acc, device=DEVICE)


def assert_every_verdict(accelerate, dtype, safeguard, returns, backend):
    ws = workspace(returns, safeguard, dtype, accelerate=accelerate)
    cost, cur, record, B = cost_of(ws), ws.core.cur, ws.record, MANY
    before = {
        "x": [ws.value(i).clone() for i in range(3)],
        "mapped": [t.clone() for t in ws.mapped[cur]],
        "saved": [None if t is None else t.clone() for t in ws.plain_saved],
    }
    next_before = [ws.value(i, 1 - cur).clone() for i in range(3)]
    kept, norms = [t.clone() for t in record.kept or []], record.best_norms.clone()
    best_cost, columns = record.best_cost.clone(), ws.core.norms.clone()
    saved = None if record.saved_norms is None else (record.saved_cost.clone(), record.saved_norms.clone())
    assert (saved is not None) == (returns == "last")
    ops.choose(backend, DEVICE).joint(ws).finish(cost, MADE)
    for b, case in enumerate(cases(B)):
        given, goes, save = case[:3]
        take = case[COLUMN[returns]]
        answer = "saved" if returns == "best" else "x"
        for i, part in enumerate(ws.parts):
            assert torch.equal(ws.value(i)[b], before["x"][i][b])
            if part.index is not None:
                assert torch.equal(ws.value(i, 1 - cur)[b], next_before[i][b])
                continue
            source = before[answer if goes == "answer" else goes][i]
            assert torch.equal(ws.value(i, 1 - cur)[b], source[b]), (b, goes)
            assert torch.equal(ws.plain_saved[i][b], before["x" if save else "saved"][i][b]), b
        assert bool(record.taken[b]) == take, b
        expected = given[5] if take else float(best_cost[b])
        expected_norms = (ws.core.block_norms if take else norms)[:, :, b]
        if saved is not None and given[:2] == (X, MADE):  # back to the iterate of the least residual
            expected, expected_norms = float(saved[0][b]), saved[1][:, :, b]
        assert float(record.best_cost[b]) == expected or (math.isnan(expected) and record.best_cost[b].isnan())
        assert torch.equal(record.best_norms[:, :, b], expected_norms)
        if saved is not None:
            assert float(record.saved_cost[b]) == (given[5] if case[COLUMN["best"]] else float(saved[0][b]))
            saved_norms = (ws.core.block_norms if case[COLUMN["best"]] else saved[1])[:, :, b]
            assert torch.equal(record.saved_norms[:, :, b], saved_norms)
        for t, old, x in zip(record.kept or [], kept, before["x"], strict=bool(kept)):
            assert torch.equal(t[b], (x if take else old)[b])
        forget, lanes = safeguard and case[6], columns.shape[-1]
        place = (b // lanes, slice(None), slice(None), b % lanes)
        assert torch.equal(ws.core.norms[place], columns[place] * (not forget)), b
        if safeguard and given[1] == MADE and given[0] != X:
            least = given[3] if forget else min(given[3], given[7])
            assert float(record.least[b]) == pytest.approx(least, rel=1e-6)
    assert torch.equal(record.best_norms[:, :, B:], norms[:, :, B:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("returns", ["best", "last", "cost"])
@pytest.mark.parametrize("safeguard", [False, True], ids=["", "safeguard"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accelerate", [("z", "mu"), ("z", "mu", "x"), ("mu",)], ids="-".join)
def test_every_verdict(accelerate, dtype, safeguard, returns, backend):
    assert_every_verdict(accelerate, dtype, safeguard, returns, backend)


def assert_as_the_oracle(B, sizes, returns, count, backend):
    """Rows and samples that are split over threads or blocks, of sizes that are no multiples of anything."""
    ends = []
    for name in ("reference", backend):
        ws = workspace(returns, True, torch.float32, sizes=sizes, B=B)
        with threads(count):
            ops.choose(name, DEVICE).joint(ws).finish(cost_of(ws), MADE)
        record = ws.record
        numbers = [*ws.plain[1], *ws.plain_saved, *(record.kept or []), record.best_norms, record.saved_norms]
        numbers += [record.taken, ws.core.norms, record.best_cost, record.saved_cost, record.least]
        ends.append([None if t is None else t.nan_to_num(7) for t in numbers])
    for expected, got in zip(*ends, strict=True):
        assert (expected is None and got is None) or torch.equal(expected, got)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("returns", ["best", "last", "cost"])
@pytest.mark.parametrize(
    ("B", "sizes"), [(17, (9001, 40_003)), (301, (5, 3)), (37, (4, 0)), (1, (33, 9))], ids=lambda part: str(part)
)
def test_samples_of_every_size_and_number_as_the_oracle(B, sizes, returns, count, backend):
    assert_as_the_oracle(B, sizes, returns, count, backend)


def assert_nothing_is_said_without_a_cost(backend):
    ws = workspace("best", False, torch.float32)
    cost = ws.record.best_cost.clone()
    ops.choose(backend, DEVICE).joint(ws).finish(None, MADE)
    assert torch.equal(ws.record.best_cost.nan_to_num(7), cost.nan_to_num(7))
    assert ws.record.taken.tolist() == [int(case[COLUMN["best"]]) for case in cases(MANY)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_cost_nothing_is_said_of_it(backend):
    assert_nothing_is_said_without_a_cost(backend)


def assert_cost_stops_its_sample(bad, n, backend):
    at = Start(*([random(3, size, seed=size)] for size in (n, n, 6)))
    for accelerate in (BLOCKS, ("z", "mu")):
        ws = step_workspace(at, dq.Anderson(m=2), accelerate)
        core = ws.core
        step = JointStep(ws, ops.choose(backend, DEVICE))
        values = [t + 0.1 for t in at.every()]
        strided = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]], device=DEVICE)[:, 0]
        step(values, 0.1, strided)
        assert core.int_row(Int.STATUS).tolist() == [R, R, R]
        assert ws.record.best_cost.tolist() == [1.0, 2.0, 3.0]
        step(values, 0.1, torch.tensor([1.0, bad, 3.0], device=DEVICE))
        assert core.int_row(Int.STATUS).tolist() == [R, X, R]
        assert float(ws.record.best_cost[1]) == 2.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [20, 9000, 20_000])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_cost_that_is_no_number_stops_its_sample(bad, n, backend):
    assert_cost_stops_its_sample(bad, n, backend)
