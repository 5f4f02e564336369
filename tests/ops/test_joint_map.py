"""The map of a joint step agrees with float64, whatever the projection, the sizes and the dtypes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from joint_step import (
    BF16,
    F16,
    F32,
    F64,
    PROJECTIONS,
    Start,
    given,
    rows,
    start,
    tree,
    workspace,
)
from problems import BACKENDS, DEVICE, EPS, same_bits, threads
from torch import Tensor

from deqfast import ops
from deqfast.ops.codes import BLOCKS, Int
from deqfast.ops.layout import accumulation_dtype
from deqfast.ops.plain.joint import joint_map
from deqfast.status import Status

pytestmark = pytest.mark.sanitize


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
