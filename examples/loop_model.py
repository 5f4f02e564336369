"""A model that iterates a block by hand, moved to deqfast in three changed lines, and what can be had from there.

The model is a small looped transformer. Every token has a state; one pass of the block lets it attend to the embedded
input and think, and the passes share their weights. A token reads the input and not the other tokens' states, so that
each is a sample of its own (`batch_dims=2`); where tokens attend to each other's states a sequence is one, and
`batch_dims` is left out. The task: at every position, the largest symbol up to there.

    python examples/loop_model.py               # two tables, out/loop_model.png and out/loop_model.json

Read `by_hand` and `by_deqfast` for the three lines, `shrinking` for a batch that gets smaller as sequences halt, and
`fine_tune` for a cache of warm starts that is your own dict.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deqfast as dq

SYMBOLS, LENGTH, WIDTH, HEADS = 8, 16, 32, 4
SLOWEST = 300  # evaluations at most
STABLE = 3  # evaluations without a change after which an answer counts as given
COLOURS = ("#D55E00", "#E69F00", "#0072B2")


class Block(nn.Module):
    """One pass: (B, T, d) states and the embedded input to the next states."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.read, self.write = (nn.Linear(WIDTH, n * WIDTH) for n in (1, 2, 1))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        h = F.layer_norm(z + x, (WIDTH,))
        query = self.query(h).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        key, value = self.read(x).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        h = F.layer_norm(h + self.write(found), (WIDTH,))
        return F.layer_norm(h + self.down(F.gelu(self.up(h))), (WIDTH,))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(SYMBOLS, WIDTH), nn.Parameter(0.5 * torch.randn(LENGTH, WIDTH))
        self.block, self.head = Block(), nn.Linear(WIDTH, SYMBOLS)

    def embed(self, symbols: Tensor) -> Tensor:
        return self.symbols(symbols) + self.places

    def loss(self, z: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.head(z).flatten(0, 1), target.flatten())

    def accuracy(self, z: Tensor, target: Tensor) -> float:
        return float((self.head(z).argmax(-1) == target).float().mean())


# ---- the loop, before and after ----


def by_hand(block: Callable[..., Tensor], x: Tensor, count: int) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(count):
        z = block(z, x)
    return z


def by_deqfast(block: Callable[..., Tensor], x: Tensor, count: int) -> Tensor:
    state = dq.Picard().init(torch.zeros_like(x), rtol=0.0, batch_dims=2)  # was: z = torch.zeros_like(x)
    for _ in range(count):
        state.step(block(state.z, x))  # was: z = block(z, x)
    return state.z  # was: z


def until_done(block: Callable[..., Tensor], x: Tensor, solver: Any, rtol: float, z: Tensor | None = None) -> Any:
    """The same with a tolerance in place of a count; the state, which knows how it went."""
    start = torch.zeros_like(x) if z is None else z
    state = solver.init(start, rtol=rtol, max_iter=SLOWEST, batch_dims=2)
    with torch.no_grad():
        while not state.done:
            state.step(block(state.z, x))
    return state


def shrinking(
    block: Callable[..., Tensor], x: Tensor, rtol: float, head: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, list[int]]:
    """A sequence leaves when its tokens have stopped or, with the head, when its answer does not change any more.

    The found states, and how many sequences each evaluation saw. Every `keep` copies what stays: it waits until an
    eighth of the batch has halted.
    """
    rows, found, seen = torch.arange(len(x)), torch.empty_like(x), []
    last, same = torch.full(x.shape[:2], -1), torch.zeros(len(x))
    state = dq.Anderson().init(torch.zeros_like(x), rtol=rtol, max_iter=SLOWEST, batch_dims=2)
    with torch.no_grad():
        while not state.done:
            state.step(block(state.z, x))
            seen.append(len(x))
            stays = state.running.any(1)
            if head is not None:
                answer = head(state.z).argmax(-1)
                same = torch.where((answer == last).all(1), same + 1, 0)
                last, stays = answer, stays & (same < STABLE)
            if 8 * int(stays.sum()) <= 7 * len(x):
                found[rows[~stays]] = state.keep(stays).z  # the finished part, in the order of its rows
                x, rows, last, same = (t[stays] for t in (x, rows, last, same))
        found[rows] = state.keep([]).z
    return found, seen


# ---- training ----


def train(model: Model, args: argparse.Namespace) -> None:
    """Through the passes of the loop by hand, a few more or fewer each time."""
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.updates):
        symbols, target = draw(32, generator)
        count = int(torch.randint(4, 13, (1,), generator=generator))
        loss = model.loss(by_hand(model.block, model.embed(symbols), count), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    symbols = torch.randint(SYMBOLS, (count, LENGTH), generator=generator)
    return symbols, symbols.cummax(1).values


def fine_tune(model: Model, args: argparse.Namespace, cached: bool) -> list[float]:
    """A few epochs more on a fixed set; evaluations a token, one number an epoch.

    The loop runs without gradients and one pass with them, as such models are trained. The cache is a dict of states by
    the id of the sample: where an id was seen before, the loop starts from what was found then.
    """
    model = copy.deepcopy(model)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(args.seed + 1)
    symbols, target = draw(args.samples, generator)
    cache: dict[int, Tensor] = {}
    nothing = torch.zeros(LENGTH, WIDTH)
    evaluations = []
    for _ in range(args.epochs):
        steps = 0
        for ids in torch.randperm(args.samples, generator=generator).split(32):
            x = model.embed(symbols[ids])
            start = torch.stack([cache.get(i, nothing) for i in ids.tolist()])
            state = until_done(model.block, x, dq.Anderson(), args.rtol, start)
            z = model.block(state.z, x)
            loss = model.loss(z, target[ids])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if cached:
                cache.update(zip(ids.tolist(), state.z, strict=True))
            steps += int(state.steps.sum())
        evaluations.append(steps / symbols.numel())
    return evaluations


# ---- what is measured ----


def residuals(block: Callable[..., Tensor], x: Tensor, solver: Any, count: int) -> Tensor:
    """(count, tokens) relative residuals."""
    solution = dq.fixed_point(
        block, torch.zeros_like(x), (x,), solver=solver, rtol=0.0, max_iter=count, batch_dims=2, trace=True
    )
    assert solution.trace is not None
    return solution.trace.flatten(1)


def best_of(repeats: int, call: Callable[[], Any]) -> float:
    """Milliseconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds)


@torch.no_grad()
def measure(model: Model, args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[int], list[int]]:
    """A row of the first table a way, and how many sequences the evaluations of the last two saw."""
    block, rtol = model.block, args.rtol
    symbols, target = draw(args.batch, torch.Generator().manual_seed(args.seed + 2))
    x = model.embed(symbols)
    plain = until_done(block, x, dq.Picard(), rtol)
    count = plain.nfe  # what the loop by hand needs until its slowest token is within the tolerance
    hand, same = by_hand(block, x, count), by_deqfast(block, x, count)
    fast = until_done(block, x, dq.Anderson(), rtol)
    (halted, seen), (decided, fewer) = shrinking(block, x, rtol), shrinking(block, x, rtol, model.head)
    ways: list[tuple[str, Tensor, list[int], Callable[[], Any]]] = [
        ("by hand", hand, [len(x)] * count, lambda: by_hand(block, x, count)),
        ("deqfast, Picard, as many evaluations", same, [len(x)] * count, lambda: by_deqfast(block, x, count)),
        ("Picard to the tolerance", plain.z, [len(x)] * count, lambda: until_done(block, x, dq.Picard(), rtol)),
        ("Anderson to the tolerance", fast.z, [len(x)] * fast.nfe, lambda: until_done(block, x, dq.Anderson(), rtol)),
        ("Anderson, sequences leave converged", halted, seen, lambda: shrinking(block, x, rtol)),
        (f"the same, or {STABLE} times the same answer", decided, fewer, lambda: shrinking(block, x, rtol, model.head)),
    ]
    rows = [
        {
            "name": name,
            "evaluations": len(sizes),
            "passes": sum(sizes) / len(x),
            "accuracy": model.accuracy(z, target),
            "difference": float((z - hand).abs().max()),
            "ms": best_of(args.repeats, call),
        }
        for name, z, sizes, call in ways
    ]
    return rows, seen, fewer


def table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in (header, *rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def picture(model: Model, args: argparse.Namespace, seen: list[int], fewer: list[int], path: Path) -> bool:
    """Whether there is one; without matplotlib, say so."""
    try:
        import matplotlib
    except ImportError:
        print("\nmatplotlib is not installed, so there is no picture: pip install matplotlib")
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    symbols, _ = draw(args.batch, torch.Generator().manual_seed(args.seed + 2))
    count = 40
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    with torch.no_grad():
        for name, solver, colour in (("by hand", dq.Picard(), COLOURS[0]), ("Anderson", dq.Anderson(), COLOURS[2])):
            trace = residuals(model.block, model.embed(symbols), solver, count).nan_to_num(0.0).clamp(min=1e-8)
            middle, slow = torch.quantile(trace, torch.tensor([0.5, 0.99]), dim=1).numpy()
            left.semilogy(range(1, len(trace) + 1), middle, color=colour, label=f"{name}, median token")
            left.semilogy(range(1, len(trace) + 1), slow, color=colour, ls="--", label=f"{name}, slowest hundredth")
    left.axhline(args.rtol, color="#777777", lw=0.8)
    left.set(xlabel="evaluations of the block", ylabel="relative residual", title="Fewer evaluations")
    for name, sizes, colour in (("converged", seen, COLOURS[2]), ("or decided", fewer, COLOURS[1])):
        right.step(range(1, len(sizes) + 1), sizes, where="mid", color=colour, label=name)
    right.set(xlabel="evaluation", ylabel="sequences in the batch", title="A batch that shrinks", ylim=(0, None))
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.grid(color="#EBEBEB")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--updates", type=int, default=240, help="of the training by hand")
    parser.add_argument("--batch", type=int, default=256, help="sequences in the first table")
    parser.add_argument("--samples", type=int, default=256, help="sequences that the second table trains on")
    parser.add_argument("--epochs", type=int, default=4, help="passes over them")
    parser.add_argument("--rtol", type=float, default=1e-4, help="relative tolerance of a token")
    parser.add_argument("--repeats", type=int, default=5, help="timings, of which the best counts")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and order")
    parser.add_argument("--quick", action="store_true", help="a small version, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture and the JSON")
    args = parser.parse_args()
    if args.quick:
        args.updates, args.batch, args.samples, args.epochs, args.repeats = 60, 32, 64, 2, 1
    return args


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model = Model()
    train(model, args)
    rows, seen, fewer = measure(model, args)
    print(f"{args.batch} sequences of {LENGTH} tokens, each to a relative residual of {args.rtol:g}\n")
    header = ["", "evaluations", "passes a sequence", "right", "largest difference", "ms"]
    cells = [
        [
            row["name"],
            str(row["evaluations"]),
            f"{row['passes']:.1f}",
            f"{100 * row['accuracy']:.1f} %",
            f"{row['difference']:.1e}",
            f"{row['ms']:.1f}",
        ]
        for row in rows
    ]
    print(table(header, cells))
    epochs = {name: fine_tune(model, args, name == "from the cache") for name in ("from zero", "from the cache")}
    print(f"\nTraining goes on, {args.samples} sequences: evaluations a token in each epoch\n")
    header = ["start", *(f"epoch {i + 1}" for i in range(args.epochs))]
    print(table(header, [[name, *(f"{value:.1f}" for value in values)] for name, values in epochs.items()]))
    options = {name: value for name, value in vars(args).items() if name != "out"}
    record = {"options": options, "torch": torch.__version__, "rows": rows, "epochs": epochs, "batch": [seen, fewer]}
    written = [args.out / "loop_model.json"]
    written[0].write_text(json.dumps(record, indent=1) + "\n")
    if picture(model, args, seen, fewer, args.out / "loop_model.png"):
        written.append(args.out / "loop_model.png")
    print("\nWrote " + " and ".join(map(str, written)))


if __name__ == "__main__":
    main()
