"""Times jaxopt on a diagonal map; runs in an interpreter with jax and jaxopt, needs neither torch nor deqfast.

    python jaxopt_worker.py anderson|broyden map.npz EVALUATIONS M

jit over vmap over samples, so the whole solve is one compiled program.  Broyden solves f(z) - z = 0, whose inverse
Jacobian starts at -I in jaxopt's sign (gamma = -1), with unit steps and no line search.  Prints one line of JSON.
"""

# mypy: disable-error-code="import-not-found"
from __future__ import annotations

import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jaxopt import AndersonAcceleration, Broyden
from jaxopt.version import __version__ as jaxopt_version


def main(method: str, path: str, evaluations: int, m: int) -> dict[str, object]:
    data = np.load(path)
    a, b = jnp.asarray(data["a"]), jnp.asarray(data["b"])
    if method == "anderson":
        solver = AndersonAcceleration(
            lambda z, b: a * z + b, history_size=m, maxiter=evaluations, tol=0.0, implicit_diff=False
        )
    else:
        solver = Broyden(
            lambda z, b: a * z + b - z, history_size=evaluations, maxiter=evaluations - 1, tol=0.0, gamma=-1.0,
            stepsize=1.0, implicit_diff=False,
        )  # fmt: skip
    solve = jax.jit(jax.vmap(lambda z, b: solver.run(z, b).params))
    z0 = jnp.zeros_like(b)
    solve(z0, b).block_until_ready()
    start = time.perf_counter()
    z = solve(z0, b).block_until_ready()
    once = time.perf_counter() - start
    repeat = max(1, round(5e-3 / once))
    seconds = []
    for _ in range(max(3, min(15, int(10.0 / (once * repeat))))):
        start = time.perf_counter()
        for _ in range(repeat):
            z = solve(z0, b).block_until_ready()
        seconds.append((time.perf_counter() - start) / repeat)
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    z64 = np.asarray(z, dtype=np.float64)
    f64 = np.asarray(data["a"], dtype=np.float64) * z64 + np.asarray(data["b"], dtype=np.float64)
    residual = np.linalg.norm(f64 - z64, axis=1) / np.linalg.norm(f64, axis=1)
    return {
        "median": statistics.median(seconds),
        "low": low,
        "high": high,
        "residual": float(np.median(residual)),
        "versions": {"jax": jax.__version__, "jaxopt": jaxopt_version},
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
