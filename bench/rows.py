"""What a batch pays for its slowest sample, and what `compact=` spares of it: `python -m bench.rows --out FILE.json`.

Solves and training steps with and without, rows of f and of vjps counted, in turns within one run: a tanh DEQ that was
trained on digits without a constraint, and 1,024 samples of which 16 are hard. `--sweep` tries other ladders of sizes,
and other prices before a batch shrinks.

One thread, processor time: the cores may have other work.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import deqfast as dq
from bench import meta, targets, timing
from bench.compat_training import Row, held, times
from deqfast.loop import compaction
from deqfast.rows import RUNG, TRUST, Schedule, needed

HIDDEN, WIDE = 128, 512
RTOL = 1e-4
WAYS: dict[str, Any] = {"plain": False, 'compact="auto"': "auto", "compact=True": True}
ALIKE = "512 alike, dear f"
LADDERS = (2, 3, 4, 6, 8, 16)
TRUSTS = (0.0, 0.1, 0.25, 0.5, 1.0)


class Cell(nn.Module):
    """tanh(rate z W + x). ``wide`` makes W of two factors, so that the same map costs eight times as much."""

    def __init__(self, weight: Tensor, wide: bool) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        rows = torch.linalg.qr(torch.randn(WIDE, HIDDEN, generator=g)).Q if wide else torch.eye(HIDDEN)
        self.first, self.second = nn.Parameter(weight @ rows.T), nn.Parameter(rows.clone())
        self.wide = wide

    def forward(self, z: Tensor, x: Tensor, rate: Tensor | float = 1.0) -> Tensor:
        product = z @ self.first
        return torch.tanh(rate * (product @ self.second if self.wide else product) + x)


class Digits(nn.Module):
    """Pixels -> logits through the fixed point of tanh(W z + x), with nothing to bound W."""

    def __init__(self) -> None:
        super().__init__()
        self.inject, self.head = nn.Linear(64, HIDDEN), nn.Linear(HIDDEN, 10)
        self.weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN) * 0.5 / HIDDEN**0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.inject(pixels)
        sol = dq.fixed_point(lambda z: torch.tanh(z @ self.weight + x), torch.zeros_like(x), rtol=1e-2, max_iter=40)
        out: Tensor = self.head(sol.z)
        return out


def trained(epochs: int) -> tuple[Tensor, Tensor]:
    """The weight of such a model, and the inputs x (1797, 128) that its fixed points have."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    data = load_digits()
    pixels, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(pixels))
    pixels, labels = pixels[order], labels[order]
    model = Digits()
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(epochs):
        for batch in torch.randperm(1347).add(450).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(pixels[batch]), labels[batch]).backward()
            optimiser.step()
    with torch.no_grad():
        return model.weight.detach().clone(), model.inject(pixels)


class Conv(nn.Module):
    """tanh(rate conv(z) + x) on (B, 16, 8, 8): a library that prepares itself for every shape it meets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        weight = torch.randn(16, 16, 3, 3)
        self.weight = nn.Parameter(weight / torch.linalg.matrix_norm(weight.flatten(1), 2))

    def forward(self, z: Tensor, x: Tensor, rate: Tensor) -> Tensor:
        return torch.tanh(rate * nn.functional.conv2d(z, self.weight, padding=1) + x)


class Case:
    """A batch: a cell, its inputs, and whether gradients are made.

    ``samples``: (B, 128) inputs; ``rate``: (B, 1) or None.
    """

    def __init__(self, cell: nn.Module, samples: Tensor, rate: Tensor | None = None, trains: bool = False) -> None:
        self.cell, self.trains = cell, trains
        self.args = (samples,) if rate is None else (samples, rate)
        self.limit = 1000

    def __call__(self, compact: Any) -> dq.Solution:
        z0 = torch.zeros_like(self.args[0])
        if not self.trains:
            return dq.fixed_point(
                self.cell, z0, self.args, rtol=RTOL, max_iter=self.limit, compact=compact, backward="none"
            )
        self.cell.zero_grad()
        sol = dq.fixed_point(self.cell, z0, self.args, rtol=RTOL, max_iter=self.limit, compact=compact)
        sol.z.square().sum().backward()
        return sol


def hard_and_easy(wide: bool, trains: bool = True) -> Case:
    """1,024 samples, 16 of which contract by 0.975 and the others by 0.55, along an orthogonal matrix."""
    g = torch.Generator().manual_seed(0)
    weight = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=g)).Q
    rate = torch.full((1024, 1), 0.55)
    rate[torch.randperm(1024, generator=g)[:16]] = 0.975
    return Case(Cell(weight, wide), 0.05 * torch.randn(1024, HIDDEN, generator=g), rate, trains)


def convolutions() -> Case:
    """512 images whose maps expand by factors from 0.5 to 1.3, drawn so that most are easy."""
    g = torch.Generator().manual_seed(0)
    rate = 0.5 + 0.8 * torch.rand(512, 1, 1, 1, generator=g) ** 4
    return Case(Conv(), torch.randn(512, 16, 8, 8, generator=g), rate)


def alike() -> Case:
    """512 samples that need the same evaluations, for they are the same."""
    g = torch.Generator().manual_seed(0)
    weight = 0.9 * torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=g)).Q
    return Case(Cell(weight, True), torch.randn(1, HIDDEN, generator=g).expand(512, HIDDEN).contiguous())


def cases(epochs: int) -> dict[str, Case]:
    weight, x = trained(epochs)
    return {
        "digits, 450 samples": Case(Cell(weight, False), x[:450]),
        "digits, 1,797 samples": Case(Cell(weight, False), x),
        "digits, 1,797 samples, dear f": Case(Cell(weight, True), x),
        "digits, a training step of 450, dear f": Case(Cell(weight, True), x[:450], trains=True),
        "16 of 1,024 hard, a training step": hard_and_easy(False),
        "16 of 1,024 hard, a training step, dear f": hard_and_easy(True),
        ALIKE: alike(),
    }


def facts(sol: dq.Solution) -> Row:
    """Evaluations, the samples' own, rows that f saw, and the same of the backward solve, if there was one."""
    B = sol.steps.numel()
    row: Row = {"samples": B, "evaluations": sol.nfe, "mean": float(sol.steps.double().mean())}
    row["own"] = int(sol.steps.sum())
    row["rows"] = sol.nfe * B if sol.rows is None else sol.rows.seen
    row["whole"] = None if sol.rows is None else sol.rows.whole
    row["converged"] = int(sol.converged.sum())
    report = sol.backward
    if report is not None:
        row["vjps"] = report.evaluations
        row["vjp_rows"] = report.evaluations * B if report.rows is None else report.rows.seen
        row["backward_converged"] = int(report.converged.sum())
    return row


def case_rows(name: str, case: Case, rounds: int) -> list[Row]:
    calls = {way: functools.partial(case, compact) for way, compact in WAYS.items()}
    if name == ALIKE:
        rounds *= 4  # a percent is asked
    taken = timing.alternate(calls, rounds=rounds, least_rounds=3, budget=8.0, clock=time.process_time)
    rows = {way: {"case": name, "row": way, **times(taken[way]), **facts(call())} for way, call in calls.items()}
    auto = rows['compact="auto"']
    found = timing.ratio(taken["plain"].seconds, taken['compact="auto"'].seconds)
    auto["faster"] = vars(found)
    if name == "16 of 1,024 hard, a training step, dear f":
        auto["held"] = [held("a training step, 16 of 1,024 hard: plain / auto", found, targets.ROWS_TRAINING)]
    elif name == ALIKE:
        lost = timing.ratio(taken['compact="auto"'].seconds, taken["plain"].seconds)
        auto["held"] = [held("all alike: auto / plain", lost, targets.ROWS_ALIKE, at_most=True)]
    elif name.startswith("digits, 1,797"):
        seen = auto["rows"] / auto["own"]
        counted = timing.Ratio(seen, seen, seen, 1.0)
        auto["held"] = [held(f"{name}: rows / the samples' own", counted, targets.ROWS_DIGITS, at_most=True)]
    return list(rows.values())


def scheduled_call(case: Case, rung: int, trust: float) -> Callable[[], dq.Solution]:
    """The same with another ladder, and another price."""

    def call() -> dq.Solution:
        with mock.patch.object(compaction, "Schedule", functools.partial(Schedule, rung=rung, trust=trust)):
            return case("auto")

    return call


def shapes(plain: dq.Solution, rung: int, trust: float) -> int:
    """How many sizes of the batch f sees."""
    steps, schedule = plain.steps, Schedule(plain.steps.numel(), confirms=True, rung=rung, trust=trust)
    return len({schedule.next(int((steps > k).sum())) for k in range(plain.nfe)})


def sweep(found: dict[str, Case]) -> list[Row]:
    """Every ladder at the default price and every price on the default ladder: rows, shapes and times."""
    rows = []
    tried = [(rung, TRUST) for rung in LADDERS] + [(RUNG, trust) for trust in TRUSTS if trust != TRUST]
    for name, case in found.items():
        calls = {f"{rung} {trust:g}": scheduled_call(case, rung, trust) for rung, trust in tried}
        taken = timing.alternate(calls, rounds=3, least_rounds=3, budget=1.0, clock=time.process_time)
        plain = case(False)
        for (rung, trust), (way, call) in zip(tried, calls.items(), strict=True):
            told = facts(call())
            row: Row = {"case": name, "rung": rung, "trust": trust, **times(taken[way]), **told}
            row["shapes"] = shapes(plain, rung, trust)
            row["forecast"] = needed(plain.steps, plain.nfe, rung=rung, trust=trust)
            rows.append(row)
            vjps = f"{row['vjp_rows']:>10,d} of vjps" if "vjp_rows" in row else ""
            print(
                f"{name:<45s} 1/{rung:<3d} trust {trust:<5g}{row['ms']:>10,.1f} ms {row['rows']:>9,d} rows "
                f"({row['rows'] / row['own']:.3f} of own) {row['shapes']} shapes{vjps}",
                flush=True,
            )
    return rows


def drawn(rounds: int) -> list[Row]:
    """Rows over the plain solve's for batches that need nearly the same: normal counts around 16, every price."""
    rows = []
    generator = torch.Generator().manual_seed(0)
    for samples in (64, 512):
        for spread in (0.3, 0.6, 1.0, 2.0):
            counts = [
                (16 + spread * torch.randn(samples, generator=generator)).round().clamp(2).int() for _ in range(rounds)
            ]
            for trust in TRUSTS:
                shares = [needed(c, int(c.max()), trust=trust) / (int(c.max()) * samples) for c in counts]
                facts = {"samples": samples, "spread": spread, "trust": trust}
                rows.append({**facts, "mean": sum(shares) / len(shares), "worst": max(shares)})
    return rows


def told(row: Row) -> str:
    line = f"{row['case']:<45s}{row['row']:<16s}{row['ms']:>10,.1f} ms{row['evaluations']:>6d} ({row['mean']:.1f})"
    line += f"{row['rows']:>10,d} rows, own {row['own']:,d}"
    if "vjp_rows" in row:
        line += f"; {row['vjps']} vjps, {row['vjp_rows']:,d} rows"
    if "faster" in row:
        line += f"  {row['faster']['ratio']:.2f} times faster"
    for one in row.get("held", []):
        line += f"  {one['what']}: {one['value']:.3f} ({'met' if one['met'] else 'MISSED'})"
    return line if row.get("whole") is None else f"{line}  {row['whole']}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rows", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="few epochs and rounds: a trial, not a measurement")
    parser.add_argument("--sweep", action="store_true", help="other schedules as well")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    options = parser.parse_args(arguments)
    bystanders = meta.Bystanders()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = {name: case for name, case in cases(3 if options.quick else 30).items() if options.only in name}
        rounds = 3 if options.quick else 15
        rows = []
        for name, case in found.items():
            new = case_rows(name, case, rounds)
            rows += new
            for row in new:
                print(told(row), flush=True)
        swept = sweep({**found, "512 images, a convolution": convolutions()}) if options.sweep else []
        nearly = drawn(40) if options.sweep else []
        command = f"OMP_NUM_THREADS=1 python -m bench.rows{' --sweep' if options.sweep else ''}"
        about = meta.describe(command, bystanders)
    finally:
        torch.set_num_threads(threads)
    record = {
        "kind": "rows",
        "quick": options.quick,
        "clock": "processor",
        "rows": rows,
        "sweep": swept,
        "drawn": nearly,
        "meta": about,
    }
    record["schedule"] = {"rung": RUNG, "trust": TRUST}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
