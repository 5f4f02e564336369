"""deqfast behind other libraries' names against those libraries: `python -m bench.compat --out FILE.json`.

torchdeq's own training on the digits and a step of an MLP with sines, without and under `installed()`; what the names
cost against `dq.fixed_point`; SciPy's Anderson, one system and a thousand; a graph by rows, by segments, and as one.

One thread, processor time, rows in turns within one run: the cores may have other work. What is asked of a row lies
beside it, with whether it was met.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import deqfast as dq
from bench import free, meta, targets, timing
from bench.compat_training import Row, digits_rows, held, inr_rows, times

SIZES = ((64, 128), (1024, 64))
EVALUATIONS = 30
Map = Callable[[Tensor], Tensor]


def overhead_rows(quick: bool) -> list[Row]:
    """dq.compat.torchdeq's functions over dq.fixed_point: the same solver, equal evaluations, f nearly free or not."""
    ours = dq.compat.torchdeq
    solvers = {
        "anderson": (ours.anderson_solver, dq.Anderson(m=6)),
        "broyden": (ours.broyden_solver, dq.Broyden(EVALUATIONS - 1)),
        "fixed_point_iter": (ours.fixed_point_iter, dq.Picard()),
    }
    rows = []
    for B, N in SIZES:
        maps = {"a z + b": free.diagonal_map(B, N)[0], "tanh(z W + x)": _tanh(B, N)}
        for (f_name, f), (name, (compat, solver)) in ((f, s) for f in maps.items() for s in solvers.items()):
            z0 = torch.zeros(B, N)
            steps = EVALUATIONS - (name == "broyden")
            options: dict[str, Any] = {"solver": solver, "rtol": 0.0, "max_iter": EVALUATIONS, "backward": "none"}
            alike: dict[str, Any] = {"stop": "all", "trace": True, "returns": "best" if name == "broyden" else "image"}
            calls: dict[str, Callable[[], object]] = {
                "dq.fixed_point": partial(dq.fixed_point, f, z0, **options),
                "dq.fixed_point, stop, trace and result alike": partial(dq.fixed_point, f, z0, **options, **alike),
                "dq.compat.torchdeq": partial(compat, f, z0, max_iter=steps, tol=0.0),
            }
            taken = timing.alternate(calls, rounds=3 if quick else 40, budget=4.0, clock=time.process_time)
            for row, own in taken.items():
                facts = {"part": "overhead", "row": row, "solver": name, "f": f_name, "size": f"{B}x{N}"}
                rows.append({**facts, **times(own)})
            found = timing.ratio(taken["dq.compat.torchdeq"].seconds, taken["dq.fixed_point"].seconds)
            rows[-1]["held"] = held("row / dq.fixed_point", found, targets.COMPAT_OVERHEAD, at_most=True)
    return rows


def _tanh(B: int, N: int) -> Map:
    g = torch.Generator().manual_seed(N)
    W, x = torch.randn(N, N, generator=g), torch.randn(B, N, generator=g)
    W *= 0.95 / torch.linalg.matrix_norm(W, 2)
    return lambda z: torch.tanh(torch.addmm(x, z, W))


class System:
    """F(x) = tanh(0.45 (left + right neighbour) + b) - x, of N unknowns or of rows of them; counts its evaluations."""

    def __init__(self, *shape: int) -> None:
        self.b = np.random.default_rng(0).standard_normal(shape)
        self.calls = 0

    def __call__(self, x: Any) -> Any:
        self.calls += 1
        return _chain(x, self.b)


def _chain(x: Any, b: Any) -> Any:
    mixed = np.empty_like(x)
    mixed[..., 1:-1] = x[..., :-2] + x[..., 2:]
    mixed[..., 0], mixed[..., -1] = x[..., 1], x[..., -2]
    return np.tanh(0.45 * mixed + b) - x


def scipy_rows(quick: bool) -> list[Row]:
    from scipy import optimize

    rows = []
    for N in (1_000, 10_000) if quick else (1_000, 1_000_000):
        systems = {"scipy.optimize.anderson": System(N), "dq.compat.scipy.anderson": System(N)}
        solvers = (optimize.anderson, dq.compat.scipy.anderson)
        ways: dict[str, Callable[[], Any]] = {
            name: partial(solve, F, np.ones(N)) for (name, F), solve in zip(systems.items(), solvers, strict=True)
        }
        rows += _scipy_rows(
            ways, systems, f"1 x {N:,}", 3 if quick else 40, budget=10.0, asked=targets.COMPAT_SCIPY.get(N)
        )
    return rows


def batch_rows(quick: bool) -> list[Row]:
    from scipy import optimize

    B, N = (50, 100) if quick else (1_000, 100)
    systems = {"scipy.optimize.anderson, a loop": System(B, N), "dq.compat.scipy.anderson, batched": System(B, N)}
    loop, batched = systems.values()

    def one_by_one() -> Any:
        calls = 0
        out = np.empty((B, N))
        for i, b in enumerate(loop.b):
            one = System(N)
            one.b = b
            out[i] = optimize.anderson(one, np.ones(N))
            calls += one.calls
        loop.calls = calls
        return out

    ways: dict[str, Callable[[], Any]] = {
        "scipy.optimize.anderson, a loop": one_by_one,
        "dq.compat.scipy.anderson, batched": partial(dq.compat.scipy.anderson, batched, np.ones((B, N)), batched=True),
    }
    asked = None if quick else targets.COMPAT_SCIPY_BATCH
    return _scipy_rows(ways, systems, f"{B:,} x {N}", 3 if quick else 7, budget=20.0, asked=asked)


def _scipy_rows(
    ways: dict[str, Callable[[], Any]],
    systems: dict[str, System],
    size: str,
    rounds: int,
    budget: float,
    asked: float | None,
) -> list[Row]:
    rows: list[Row] = []
    for name, solve in ways.items():
        F = systems[name]
        F.calls = 0
        x = solve()
        largest = float(np.abs(_chain(x, F.b)).max())
        rows.append({"part": "scipy", "row": name, "size": size, "calls": F.calls, "residual": largest})
    alone = {f"F of {name}": partial(_chain, *_of_one_call(F, name)) for name, F in systems.items()}
    taken = timing.alternate({**ways, **alone}, rounds=rounds, budget=budget, clock=time.process_time)
    for row in rows:
        name = row["row"]
        row.update(times(taken[name]), f_ms=1e3 * taken[f"F of {name}"].median * row["calls"])
    theirs, ours = (taken[row["row"]].seconds for row in rows)
    if asked is not None:
        rows[-1]["held"] = held("scipy / row", timing.ratio(theirs, ours), asked)
    return rows


def _of_one_call(F: System, name: str) -> tuple[Any, Any]:
    """What one evaluation takes: all systems, or in a loop the first one."""
    b = F.b[0] if name.endswith("loop") else F.b
    return np.ones_like(b), b


NODES, GRAPHS, WIDTH = 1_000, 20, 16


def graph(seed: int, orthogonal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Symmetric A of random graphs with rows that sum to 1, W with ||W||_2 = 0.95, and x."""
    g = torch.Generator().manual_seed(seed)
    size = NODES // GRAPHS
    blocks = []
    for _ in range(GRAPHS):
        edges = (torch.rand(size, size, generator=g) < 0.06).double().triu(1)
        edges += edges.T.clone()
        degree = edges.sum(1)
        weights = edges / (1 + torch.maximum(degree[:, None], degree))
        blocks.append(weights + torch.diag(1 - weights.sum(1)))
    W = torch.randn(WIDTH, WIDTH, generator=g)
    if orthogonal:
        W = torch.linalg.qr(W).Q
    W *= 0.95 / torch.linalg.matrix_norm(W, 2)
    return torch.block_diag(*blocks).float(), W, torch.randn(NODES, WIDTH, generator=g)


def graph_rows(quick: bool) -> list[Row]:
    """Evaluations and true residuals of the worst graph and the worst node, over some draws of graph and W."""
    node_of = torch.arange(NODES) // (NODES // GRAPHS)
    ways: dict[str, dict[str, Any]] = {
        "rows are samples (batch_dims=1)": {},
        "segments=": {"segments": node_of},
        "one sample (batch_dims=0)": {"batch_dims": 0},
    }
    rows = []
    for orthogonal in (False, True):
        found: dict[str, list[tuple[int, bool, float, float]]] = {name: [] for name in ways}
        for seed in range(2 if quick else 10):
            A, W, x = graph(seed, orthogonal)
            sparse = A.to_sparse_csr()
            for name, options in ways.items():
                f = partial(_of_graph, sparse, W, x)
                sol = dq.fixed_point(f, torch.zeros(NODES, WIDTH), rtol=1e-4, max_iter=300, backward="none", **options)
                z = sol.z.double()
                image = _of_graph(A.double(), W.double(), x.double(), z)
                worst = (_worst(image - z, image, GRAPHS), _worst(image - z, image, NODES))
                found[name].append((sol.nfe, bool(sol.converged.all()), *worst))
        rows += _graph_rows(found, "orthogonal" if orthogonal else "Gaussian")
    return rows


def _graph_rows(found: dict[str, list[tuple[int, bool, float, float]]], kind: str) -> list[Row]:
    rows: list[Row] = []
    for name, outcomes in found.items():
        calls, converged, of_graphs, of_nodes = zip(*outcomes, strict=True)
        facts = {"part": "graph", "row": name, "W": kind, "draws": len(calls), "draws_converged": sum(converged)}
        worst = {"residual": max(of_graphs), "node_residual": max(of_nodes)}
        rows.append({**facts, "calls": float(np.median(calls)), "most_calls": max(calls), **worst})
        if name == "segments=":
            by_rows = [outcome[0] for outcome in found["rows are samples (batch_dims=1)"]]
            ratio = timing.ratio(calls, by_rows)
            rows[-1]["held"] = held("evaluations / those by rows", ratio, targets.COMPAT_SEGMENTS, at_most=True)
    return rows


def _of_graph(A: Tensor, W: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return torch.tanh(A @ z @ W + x)


def _worst(difference: Tensor, image: Tensor, samples: int) -> float:
    gap, size = (t.reshape(samples, -1).norm(dim=1) for t in (difference, image))
    return float((gap / size).max())


PARTS = {
    "digits": digits_rows,
    "sines": inr_rows,
    "overhead": overhead_rows,
    "scipy": scipy_rows,
    "batch": batch_rows,
    "graph": graph_rows,
}


def told(row: Row) -> str:
    label = ", ".join(str(row[key]) for key in ("part", "row", "solver", "f", "size", "W") if key in row)
    took = f"{row['ms']:>12,.3f} ms" if "ms" in row else " " * 15
    calls = f"{row['calls']:>8,.1f} evaluations" if "calls" in row else ""
    line = f"{label:<75s}{took}{calls}"
    if "held" in row:
        asked = row["held"]
        bound = "at most" if asked["at_most"] else "at least"
        verdict = "met" if asked["met"] else "MISSED"
        line += f"  {asked['what']}: {asked['value']:.3f} ({bound} {asked['asked']:g}: {verdict})"
    return line


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compat", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="all by default")
    parser.add_argument("--quick", action="store_true", help="small and few rounds: a trial, not a measurement")
    options = parser.parse_args(arguments)
    bystanders, rows = meta.Bystanders(), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # solves at their limit; residuals tell
            for part in options.parts:
                new = PARTS[part](options.quick)
                rows += new
                for row in new:
                    print(told(row), flush=True)
        about = meta.describe("OMP_NUM_THREADS=1 python -m bench.compat", bystanders)
    finally:
        torch.set_num_threads(threads)
    record = {"kind": "compat", "quick": options.quick, "clock": "processor", "rows": rows, "meta": about}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
