"""Turns the newest adoption run into docs/adoption.md: `python -m adoption.report`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report.markdown import number, provenance, table
from bench.report.newest import newest

ROOT = Path(__file__).resolve().parents[1]
CLEARLY = 1.05  # of evaluations; of times the interval decides


def evaluations_won(row: Mapping[str, Any]) -> str:
    own, ours = row["evaluations"]
    if own is None or ours is None or not any(row["solved"]):
        return "-"
    return "deqfast" if own > CLEARLY * ours else "own" if ours > CLEARLY * own else "even"


def time_won(row: Mapping[str, Any]) -> str:
    if row["ratio"] is None or not any(row["solved"]):
        return "-"
    _, low, high = row["ratio"]
    return "deqfast" if low > 1 else "own" if high < 1 else "even"


def winner(row: Mapping[str, Any]) -> str:
    own, ours = row["solved"]
    if own != ours:
        return "**own**, deqfast's is not within" if own else "deqfast, own is not within"
    if not own:
        return "neither is within"
    count, time = evaluations_won(row), time_won(row)
    if count == "-":
        return time.replace("own", "**own**")
    if time in ("-", count):
        return "**own**" if count == "own" else count
    return f"evaluations {count.replace('own', '**own**')}, time {time.replace('own', '**own**')}"


def line(row: Mapping[str, Any], versions: Mapping[str, str]) -> list[str]:
    own, ours = row["evaluations"]
    ratio = "-" if row["ratio"] is None else "{} ({} to {})".format(*map(number, row["ratio"]))
    return [
        f"{row['package']} {versions.get(row['package'], '')}".strip(),
        row["problem"],
        row["own"],
        f"{'?' if own is None else own} / {'?' if ours is None else ours}",
        ratio,
        f"{row['difference']:.0e} ({row['within']:.0e})",
        winner(row),
        row["note"],
    ]


def replaced(record: Mapping[str, Any]) -> list[str]:
    header = [
        "package",
        "problem",
        "own solver",
        "evaluations, own / deqfast",
        "time, own / deqfast",
        "difference (asked)",
    ]
    rows = record["rows"]
    counts, times = [evaluations_won(row) for row in rows], [time_won(row) for row in rows]
    said = [
        f"{what}: deqfast ahead in {won.count('deqfast')}, even in {won.count('even')}, own ahead in {won.count('own')}"
        for what, won in (("evaluations", counts), ("time", times))
    ]
    return [
        "## Solvers replaced",
        "The package's own solver and deqfast in its place, in one process, in turns; above 1 deqfast is faster. The "
        "interval holds the true ratio with 95 % (of fewer than six turns it is all of them). The time is the "
        "processor's, of the user's whole call on one thread, integrals, physics and backward pass included.",
        "; ".join(said).capitalize() + ".",
        table([*header, "ahead", "note"], [line(row, record["meta"]["versions"]) for row in rows]),
    ]


def singles(record: Mapping[str, Any]) -> list[str]:
    rows = [row for row in record["solves"] if "evaluations" in row]
    if not rows:
        return []
    solvers = list(rows[0]["evaluations"])
    lines = [
        [row["suite"], row["problem"], str(row["N"]), *(_count(row["evaluations"][s]) for s in solvers)] for row in rows
    ]
    total = [str(sum(row["evaluations"][s] is not None for row in rows)) for s in solvers]
    return [
        "## Systems of other solvers' tests",
        "Evaluations of F until no |F_i| is above 1e-8 (hybr: its own tolerance at 1e-12), each solver with its "
        "defaults; a dash where no root was found with 2000 evaluations, judged at 1e-6. hybr makes its Jacobian by "
        "differences, an evaluation a number. `dq.root` solves z = z + F(z), with the sign and scale that F happens to "
        "have.",
        table(
            ["from", "system", "N", *(f"`{s}`" if s.startswith("dq.") else s for s in solvers)],
            [*lines, ["", "**solved**", f"of {len(rows)}", *total]],
        ),
    ]


def batches(record: Mapping[str, Any]) -> list[str]:
    rows = [row for row in record["solves"] if "starts" in row]
    if not rows:
        return []
    solvers = list(rows[0]["starts"])
    lines = [[row["problem"], *(str(row["starts"][s]) for s in solvers)] for row in rows]
    total = [str(sum(row["starts"][s] for row in rows)) for s in solvers]
    return [
        "## The same from eight starts",
        "How many of eight starts, the standard one and seven within a tenth of it, end at a root: as rows "
        "of one batch, which has no line search, or one after the other.",
        table(["MGH", *(f"`{s}`" if s.startswith("dq.") else s for s in solvers)], [*lines, ["**solved**", *total]]),
    ]


def _count(found: int | None) -> str:
    return "-" if found is None else str(found)


def write(results: Path, out: Path) -> None:
    record = newest(results, "adoption")
    if record is None:
        raise SystemExit(f"no adoption results in {results}: run `make adoption` first")
    busy = record["meta"]["busy_elsewhere"]
    alone = (
        ""
        if busy is None
        else f" Other programs kept {busy:.2f} cores busy meanwhile, which processor time leaves out."
    )
    parts = [
        "# Adoption",
        "Other packages, with deqfast in place of their fixed-point solvers. Written by `python -m adoption.report` "
        "from the newest `make adoption`; edit nothing here.",
        provenance({**record["meta"], "busy_elsewhere": None}) + alone,
    ]
    parts += replaced(record) if record["rows"] else []
    parts += singles(record) + batches(record)
    if record["skipped"]:
        parts += [
            "## Left out",
            table(["test", "why"], [[f"`{name}`", why] for name, why in record["skipped"].items()]),
        ]
    out.write_text("\n\n".join(parts) + "\n")
    print(f"wrote {out.name}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m adoption.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "adoption.md")
    options = parser.parse_args(arguments)
    write(options.results, options.out)


if __name__ == "__main__":
    main()
