"""Is it worth while to solve under autocast to bfloat16 first? Counts, and time of the two kinds of product.

    python -m bench.coarse --out bench/results/coarse.json

The trained networks of the suite are solved under autocast to a relative residual of 2e-2, and on from there without,
to rtol; the same from the start without is beside it, evaluations a batch of eight. Products (B, N) x (N, N) are timed
in both dtypes, with and without the casts that autocast makes, processor time of one thread in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import deqfast as dq
from bench import meta
from bench.families import models

FIRST, TOLERANCES = 2e-2, (1e-3, 1e-4)
SIZES = ((8, 128), (64, 512), (256, 2048))


def counts(kind: str, factor: float, rtol: float) -> dict[str, Any]:
    cell, x, _ = models.scaled(kind, factor, torch.float32)
    with torch.no_grad():
        plain = dq.fixed_point(cell, cell.start(x), (x,), rtol=rtol, max_iter=200)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            coarse = dq.fixed_point(cell, cell.start(x), (x,), rtol=FIRST, max_iter=200)
        fine = dq.fixed_point(cell, coarse.z, (x,), rtol=rtol, max_iter=200)
    made = {"plain": plain.nfe, "coarse": coarse.nfe, "then": fine.nfe}
    return {"problem": f"{kind}/{factor:g}", "tolerance": rtol, **made}


def products(rows: int, n: int) -> dict[str, Any]:
    z, w = torch.randn(rows, n), torch.randn(n, n)
    narrow = z.bfloat16(), w.bfloat16()

    def cast() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return z @ w

    took: dict[str, list[float]] = {"float32": [], "bfloat16": [], "autocast": []}
    calls = {"float32": lambda: z @ w, "bfloat16": lambda: narrow[0] @ narrow[1], "autocast": cast}
    for _ in range(9):
        for name, call in calls.items():
            repeats = max(3, 200_000_000 // (rows * n * n))
            start = time.process_time()
            for _ in range(repeats):
                call()
            took[name].append(1e6 * (time.process_time() - start) / repeats)
    return {"rows": rows, "n": n, **{name: statistics.median(found[1:]) for name, found in took.items()}}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.coarse", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/coarse.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    bystanders = meta.Bystanders()
    solved = [counts(k, f, rtol) for rtol in TOLERANCES for k, factors in models.SCALES.items() for f in factors]
    timed = [products(rows, n) for rows, n in SIZES]
    print(*solved, *timed, sep="\n")
    record: dict[str, Any] = {"kind": "coarse", "solved": solved, "products": timed}
    record["meta"] = meta.describe("python -m bench.coarse", bystanders)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
