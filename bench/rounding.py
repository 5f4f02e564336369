"""What rounding Anderson's columns costs in evaluations, with everything else in float64.

    python -m bench.rounding --out FILE.json           # a few minutes
    python -m bench.rounding --out FILE.json --quick   # eleven problems

The convergence suite in float64, backend "torch", ten columns, the ridge of float32 states. Between the difference and
the history stands a codec, for dF and for dG: so what is seen is that of the rounding alone, of both or of one of them,
and of scales that are no powers of two, which no backend has.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deqfast as dq
from bench import meta, peers, problems
from bench.recorder import count
from bench.report import summary
from deqfast.ops.codes import BLOCK
from deqfast.ops.plain.codec import encode_part, scale_part
from deqfast.ops.plain.columns import Columns

TOLERANCES = (1e-3, 1e-5, 1e-8)
CAP = 300
SOLVER = dq.Anderson(m=10, ridge=1e-4, history_dtype=torch.float64)

Codec = Callable[[Tensor], Tensor]


def cast(dtype: torch.dtype) -> Codec:
    """Rounded to a dtype that needs no scale."""
    return lambda column: column.to(dtype).to(column.dtype)


def scaled(dtype: torch.dtype) -> Codec:
    """Rounded as histories are: a power of two for every 1,024 numbers."""

    def through(column: Tensor) -> Tensor:
        codes, scales = encode_part(dtype, column)
        found = codes.to(column.dtype)
        scale_part(found, scales)
        return found

    return through


def to_largest(column: Tensor) -> Tensor:
    """Eight bits with the largest of every 1,024 numbers at 127."""
    blocks = torch.nn.functional.pad(column, (0, -column.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(column.dtype).tiny)
    return ((blocks / scale).round() * scale).flatten(-2)[..., : column.shape[-1]]


INT8 = scaled(torch.int8)
BFLOAT16 = cast(torch.bfloat16)
# How dF and dG are stored.
WAYS: dict[str, tuple[Codec, Codec]] = {
    "float64": (lambda column: column,) * 2,
    "float32": (cast(torch.float32),) * 2,
    "bfloat16": (BFLOAT16,) * 2,
    "float16": (scaled(torch.float16),) * 2,
    "int8": (INT8,) * 2,
    "dF int8, dG bfloat16": (INT8, BFLOAT16),
    "dF bfloat16, dG int8": (BFLOAT16, INT8),
    "int8, exact scale": (to_largest,) * 2,
}


@contextlib.contextmanager
def stored_by(way: tuple[Codec, Codec]) -> Iterator[None]:
    """Backend "torch" with these codecs."""
    plain = Columns.round

    def through(self: Columns, pair: Tensor, finite: bool) -> Tensor:
        pair = plain(self, pair, finite)
        for column, codec in zip(pair, way, strict=True):
            column.copy_(codec(column))
        return pair

    Columns.round = through  # type: ignore[method-assign]
    try:
        yield
    finally:
        Columns.round = plain  # type: ignore[method-assign]


def count_all(suite: Sequence[problems.Problem], ways: Sequence[str] = tuple(WAYS)) -> dict[str, Any]:
    """Evaluations to tolerance, in the form of a convergence run."""
    found: dict[str, dict[str, Any]] = {way: {} for way in ways}
    described: dict[str, Any] = {}
    for problem in suite:
        finest = problem.tightest if problem.tightest > 1e-6 else 0.0  # else float32's own, which is none here
        tolerances = [t for t in TOLERANCES if t >= finest]
        described[problem.name] = {"B": problem.B, "N": problem.N, "tolerances": tolerances}
        for way in ways:
            with stored_by(WAYS[way]):
                peer = peers.deqfast(SOLVER, way, "torch")
                found[way][problem.name] = vars(count(peer, problem, tolerances, CAP))
    return {"problems": described, "counts": found, "cap": CAP, "tolerances": list(TOLERANCES)}


def summarised(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a way: geometric means and failures at each tolerance, of forward problems and of adjoint ones."""
    rows = []
    for way in record["counts"]:
        row: dict[str, Any] = {"stored": way}
        for kind, adjoint in (("forward", False), ("adjoint", True)):
            chosen = {name: told for name, told in record["problems"].items() if ("adjoint" in name) == adjoint}
            part = {**record, "problems": chosen}
            row[kind] = (
                [[summary.geometric_mean(part, way, (t,)), summary.failed_percent(part, way, (t,))] for t in TOLERANCES]
                if chosen
                else []
            )
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rounding", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="eleven problems: a trial")
    parser.add_argument("--problems", default="*", help="shell pattern of problem names")
    options = parser.parse_args(arguments)
    bystanders = meta.Bystanders()
    record = count_all(problems.suite(torch.float64, options.problems, options.quick))
    record.update(kind="rounding", quick=options.quick, rows=summarised(record))
    del record["counts"], record["problems"]
    record["meta"] = meta.describe("python -m bench.rounding", bystanders)
    for row in record["rows"]:
        cells = [f"{mean:7.1f} {failed:4.1f} %" for kind in ("forward", "adjoint") for mean, failed in row[kind]]
        print(f"{row['stored']:<24s}" + "".join(cells), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
