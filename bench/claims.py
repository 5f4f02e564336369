"""What a fixed-point solver should get right, as assertions about any solver: deqfast's tests hold it to them, and
bench/test_rival_defects.py shows that torchdeq 0.1.0 falls short of each.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Map = Callable[..., Tensor]
Evaluations = Callable[[Map, Tensor, float], int]  # (f, z0, rtol), of a solve that must converge

RATES = torch.linspace(0.2, 0.9, 12, dtype=torch.float64)


class Counted:
    """A map that remembers how many rows each evaluation saw."""

    def __init__(self, f: Map) -> None:
        self.f = f
        self.rows: list[int] = []

    def __call__(self, z: Tensor, *args: Any) -> Tensor:
        self.rows.append(len(z))
        return self.f(z, *args)


def symmetric(B: int, N: int, norm: float, dtype: torch.dtype = torch.float64) -> tuple[Map, Tensor]:
    """z -> A z + b, the eigenvalues of A spread from 0 to norm, and zeros (B, N) to start at."""
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=torch.float64))[0]
    A = ((Q * torch.linspace(0, norm, N, dtype=torch.float64)) @ Q.mT).to(dtype)
    b = torch.randn(B, N, generator=generator, dtype=torch.float64).to(dtype)
    return lambda z: z @ A.mT + b, torch.zeros_like(b)


def assert_scaled_counts(evaluations: Evaluations) -> None:
    """The scale of a problem does not decide what it costs, as an absolute ridge lets it."""
    f, z0 = symmetric(4, 30, 0.95)
    counts = []
    for s in (1e3, 1.0, 1e-3):
        scaled = lambda z: s * f(z / s)  # noqa: B023, E731
        counts.append(evaluations(scaled, z0, 1e-6))
    assert max(counts) - min(counts) <= 1, counts


def assert_faster_than_plain(evaluations: Evaluations, plain: Evaluations) -> None:
    """Acceleration pays on a float32 problem whose residual is soon small in absolute terms."""
    f, z0 = symmetric(4, 30, 0.97, torch.float32)
    small = lambda z: 1e-2 * f(z / 1e-2)  # noqa: E731
    assert evaluations(small, z0, 1e-5) < 0.6 * plain(small, z0, 1e-5)


def assert_nan_sample_is_contained(solve: Callable[[Map, Tensor], Tensor]) -> None:
    """Row 1 contracts until its fifth evaluation and is NaN from then on: its best iterate stays, the others go on."""
    calls: list[int] = []

    def f(z: Tensor) -> Tensor:
        calls.append(1)
        fz = RATES * z + 1
        if len(calls) >= 5:
            fz[1] = torch.nan
        return fz

    z = solve(f, torch.zeros(3, 12, dtype=torch.float64))
    assert bool(torch.isfinite(z).all()), "the best iterate is lost"
    assert float((RATES * z + 1 - z)[1].norm()) < 0.8 * 12**0.5  # at the start f - z is one
    assert len(calls) < 400, "the batch was dragged on"
    exact = 1 / (1 - RATES)
    assert bool(((z - exact)[[0, 2]].norm(dim=1) <= 10 * 1e-9 * exact.norm()).all())


def assert_limited_memory_converges(evaluations: Evaluations) -> None:
    f, z0 = symmetric(3, 40, 0.97)
    assert evaluations(f, z0, 1e-6) <= 200


def assert_finished_samples_rest(solve: Callable[[Map, Tensor], object]) -> None:
    """Rows with rate 0.1 are done after about nine evaluations; one row with rate 0.99 is not."""
    rate = torch.full((8, 1), 0.1, dtype=torch.float64)
    rate[3] = 0.99
    seen: list[Tensor] = []

    def f(z: Tensor) -> Tensor:
        seen.append(z.clone())
        return rate * z + 1

    solve(f, torch.zeros(8, 2, dtype=torch.float64))
    fast = [0, 1, 2, 4, 5, 6, 7]
    assert len(seen) > 100
    assert all(torch.equal(z[fast], seen[20][fast]) for z in seen[20:]), "finished samples still move"


def assert_slow_sample_pays_alone(solve: Callable[[Map, Tensor, Tensor], object]) -> None:
    """solve(f, z0, rate) evaluates f(z, rate) on the rows that are not done."""
    rate = torch.full((16, 1), 0.1, dtype=torch.float64)
    rate[3] = 0.99
    f = Counted(lambda z, rate: rate * z + 1)
    solve(f, torch.zeros(16, 2, dtype=torch.float64), rate)
    assert sum(f.rows) < 4 * len(f.rows), "every evaluation saw every sample"


def assert_tolerance_is_honoured(residual: Callable[[float], float]) -> None:
    """residual(tolerance) of a solve that asks for it."""
    loose, tight = residual(1e-1), residual(1e-8)
    assert tight <= 1e-8 < loose <= 1e-1


def assert_damping_does_not_flatter(residual: Callable[[float], float]) -> None:
    """residual(damping) told of f(z) = z / 2 + 1 at z = 1: f - z = 1/2, whatever the damping."""
    for damping in (1.0, 0.5, 0.1):
        assert abs(residual(damping) - 0.5) <= 1e-12, damping


class Layered(torch.nn.Module):
    """linear -> equilibrium -> linear; ``value`` takes the equilibrium out of what solve(f, z0) returns."""

    def __init__(self, solve: Callable[[Map, Tensor], Any], value: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.first, self.inner, self.last = (torch.nn.Linear(6, 6) for _ in range(3))
        torch.nn.init.normal_(self.inner.weight, std=0.1)
        self.solve, self.value = solve, value

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        found = self.solve(lambda z: torch.tanh(self.inner(z) + h), torch.zeros_like(h))
        out: Tensor = self.last(self.value(found))
        return out


def assert_compiled_in_three_graphs(solve: Callable[[Map, Tensor], Any], value: Callable[[Any], Tensor]) -> None:
    """What lies before the solve, f, and what lies after it."""
    model, x = Layered(solve, value), torch.randn(4, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's imports, and what the tracer meets
        dynamo = importlib.import_module("torch._dynamo")
        dynamo.reset()
        dynamo.utils.counters.clear()
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))
        breaks = sum(dynamo.utils.counters["graph_break"].values())
        graphs = dynamo.utils.counters["stats"]["unique_graphs"]
        dynamo.reset()
        dynamo.utils.counters.clear()
    assert (breaks, graphs) == (1, 3), f"{breaks} graph breaks, {graphs} graphs"
