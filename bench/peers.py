"""One signature for deqfast and its rivals: solve(f, z0, evaluations, rtol) -> z.

Contracts, from each source:
* torchdeq 0.1.0 Anderson evaluates f max_iter times, Broyden max_iter + 1, fixed-point iteration max_iter; it stops
  when the worst sample of the batch meets tol; `stop_mode='rel'` divides by ||f(z)||.  Anderson and fixed-point
  iteration return f of their best iterate, Broyden the iterate.
* scipy solves F(z) = 0 for one sample on NumPy arrays, here with the line search off; it starts with one evaluation
  more than its iterations.
* jaxopt runs in an interpreter of its own (bench/jaxopt_worker.py), since its arrays and threads are not torch's.

`rtol = 0` makes every solver use all its evaluations.  Residuals are recomputed in float64 from the returned z, the
same way for everybody (`run`); what a solver reports about itself is not used.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import rival

Map = Callable[[Tensor], Tensor]
Solve = Callable[[Map, Tensor, int, float], Tensor]


@dataclass(frozen=True)
class Peer:
    """A named solver; `only_single` marks those that take one sample at a time."""

    name: str
    solve: Solve
    only_single: bool = False


@dataclass(frozen=True)
class Outcome:
    z: Tensor
    evaluations: int
    residual: Tensor  # (B,) float64, ||f(z) - z|| / ||f(z)||


def relative_residual(z: Tensor, fz: Tensor) -> Tensor:
    """Per-sample ||f(z) - z|| / ||f(z)|| in float64; 0 where both vanish."""
    z64, f64 = z.double().flatten(1), fz.double().flatten(1)
    gap, size = (f64 - z64).norm(dim=1), f64.norm(dim=1)
    return torch.where(gap == 0, gap, gap / size.clamp_min(torch.finfo(torch.float64).tiny))


def run(peer: Peer, f: Map, z0: Tensor, evaluations: int, rtol: float = 0.0) -> Outcome:
    """Solve once, count the calls of f that the solver made, and measure what it returned."""
    calls = 0

    def counted(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return f(z)

    with torch.no_grad():
        z = peer.solve(counted, z0, evaluations, rtol)
        return Outcome(z, calls, relative_residual(z, f(z)))


def deqfast(solver: Any, name: str, backend: str = "native") -> Peer:
    """A deqfast solver: an options object such as dq.Anderson(m=5), or a solver's name for its defaults."""
    import deqfast as dq

    def solve(f: Map, z0: Tensor, evaluations: int, rtol: float) -> Tensor:
        return dq.fixed_point(
            f, z0, solver=solver, rtol=rtol, atol=0.0, max_iter=evaluations, backward="none", backend=backend
        ).z

    return Peer(name, solve)


def torchdeq(method: str, name: str, **options: Any) -> Peer:
    """torchdeq's 'anderson', 'broyden' (full memory unless LBFGS_thres is given) or 'fixed_point_iter'."""
    from torchdeq.solver import anderson, broyden, fp_iter

    call = {
        "anderson": anderson.anderson_solver,
        "broyden": broyden.broyden_solver,
        "fixed_point_iter": fp_iter.fixed_point_iter,
    }[method]
    extra = 1 if method == "broyden" else 0

    def solve(f: Map, z0: Tensor, evaluations: int, rtol: float) -> Tensor:
        return call(f, z0, max_iter=evaluations - extra, tol=rtol, stop_mode="rel", **options)[0]

    return Peer(name, solve)


def compiled(m: int = 6) -> Peer:
    """torch.compile of the plain-torch step of bench/rival.py."""

    def solve(f: Map, z0: Tensor, evaluations: int, rtol: float) -> Tensor:
        return rival.anderson(f, z0, evaluations, rtol, m)

    return Peer("torch.compile", solve)


def scipy(method: str, m: int = 6) -> Peer:
    """scipy.optimize's 'anderson' or 'broyden1' on one sample; running out of iterations is no error."""
    from scipy.optimize import NoConvergence
    from scipy.optimize import anderson as scipy_anderson
    from scipy.optimize import broyden1 as scipy_broyden

    def solve(f: Map, z0: Tensor, evaluations: int, rtol: float) -> Tensor:
        def residual(flat: np.ndarray) -> np.ndarray:
            z = torch.from_numpy(flat).to(z0.dtype).view_as(z0)
            return (f(z) - z).reshape(-1).numpy()

        start = z0.reshape(-1).numpy()
        common: dict[str, Any] = {"alpha": -1.0, "iter": evaluations - 1, "line_search": None}
        try:
            if method == "anderson":
                flat = scipy_anderson(residual, start, M=m, **common)
            else:
                flat = scipy_broyden(residual, start, **common)
        except NoConvergence as stop:
            flat = stop.args[0]
        return torch.from_numpy(np.asarray(flat)).to(z0.dtype).view_as(z0)

    return Peer(f"scipy {method}", solve, only_single=True)


def jaxopt_python(given: str | None = None) -> str | None:
    """The interpreter that has jaxopt: the option, or the variable DEQFAST_BENCH_JAX; None if neither is set."""
    return given or os.environ.get("DEQFAST_BENCH_JAX") or None


def jaxopt(
    method: str, a: Tensor, b: Tensor, evaluations: int, *, python: str | None, m: int = 6, timeout: float = 240.0
) -> dict[str, Any]:
    """Time jaxopt on the diagonal map in its own interpreter.

    Returns seconds a solve (median, quartiles), the residual and the versions, or {"skipped": reason}.
    """
    interpreter = jaxopt_python(python)
    if interpreter is None:
        return {"skipped": "no interpreter with jaxopt was named"}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "map.npz"
        np.savez(data, a=a.numpy(), b=b.numpy())
        worker = Path(__file__).with_name("jaxopt_worker.py")
        command = [interpreter, str(worker), method, str(data), str(evaluations), str(m)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            return {"skipped": f"jaxopt did not run: {type(error).__name__}"}
    return json.loads(done.stdout.splitlines()[-1])
