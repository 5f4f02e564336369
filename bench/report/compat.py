"""The section on deqfast behind other libraries' names, and what is held against its targets."""

from __future__ import annotations

from collections.abc import Callable

from bench.report.markdown import Results, number, provenance, table, verdict

Row = Results
LABELS = ("part", "row", "solver", "f", "size", "W")


def compat_checks(record: Results) -> list[list[str]]:
    rows = []
    for row in record["rows"]:
        if "held" in row:
            label = ", ".join(str(row[key]) for key in LABELS if key in row)
            rows.append([f"{label}: {row['held']['what']}", _met(row)])
    return rows


def _met(row: Row) -> str:
    asked = row["held"]
    return verdict(asked["value"], asked["asked"], at_most=asked["at_most"])


def compat_section(record: Results) -> list[str]:
    parts = ["## Behind other libraries' names", provenance(record["meta"], of_the_processor=True), _NOTE]
    for part, title, note, columns in _PARTS:
        rows = [row for row in record["rows"] if row["part"] == part]
        if rows:
            cells = [[column(row) for column in columns.values()] for row in rows]
            parts += [f"### {title}", note, table(list(columns), cells)]
    return parts


def _text(key: str) -> Callable[[Row], str]:
    return lambda row: str(row[key])


def _number(key: str) -> Callable[[Row], str]:
    return lambda row: number(row[key])


def _small(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key]:.0e}"


def _time(row: Row) -> str:
    return f"{number(row['ms'])} ({number(row['ms_low'])} to {number(row['ms_high'])})"


def _asked(row: Row) -> str:
    if "held" not in row:
        return ""
    asked = row["held"]
    return f"{asked['what']}: {_met(row)}; {number(asked['low'])} to {number(asked['high'])}"


def _draws(row: Row) -> str:
    return f"{row['draws_converged']} of {row['draws']}"


_ROW = {"row": _text("row")}
_TIME = {"ms (quartiles)": _time}
_ASKED = {"asked": _asked}

_NOTE = (
    "One thread, time of the processor, rows in turns within one run. A ratio is the median over the turns, with the "
    "interval that holds it with 95 % or, of few turns, all of them; met or missed says what was asked. *Installed* "
    "rows run the same code on torchdeq's modules, built under `dq.compat.torchdeq.installed()`."
)

_DIGITS = (
    "The model of examples/digits.py, every run from the same weights over the same batches of 64: some epochs and the "
    "test at their end, all of it timed. 1e-4 relative in both passes, at most 60 evaluations. *f* and *VJPs* are of a "
    "batch; residuals are relative ones of the state and of the gradient, medians over the test digits after training, "
    "in float64. torchdeq's fastest may be one that does not reach the tolerance; ours has to."
)
_SINES = (
    "f(z, x) = sin(V sin(W z) + x), 1024 samples of 64 numbers, V and W orthogonal with ||J|| <= 0.95, both passes at "
    "1e-4 relative, f once more for its graph. *Of that f*: what so many evaluations and products take by themselves, "
    "measured in the same run. *Gradient error* is that of the weights' gradients against a solve at 1e-9 in float64."
)
_OVERHEAD = (
    "30 evaluations, no tolerance. Beside `dq.fixed_point` as it comes, the same with the stop, the trace and the "
    "result that torchdeq's functions have."
)
_SCIPY = (
    "F(x) = tanh(0.45 (left + right neighbour) + b) - x from x = 1, each solver with its defaults, until no |F_i| is "
    "above 6e-6. The loop is of SciPy's solver, its evaluations those of all systems; the batch evaluates all "
    "systems at once. *Of that F*: what so many evaluations take by themselves, measured in the same run."
)
_GRAPH = (
    "f(z) = tanh(A z W + x), 1000 nodes of 16 numbers as 20 graphs, A sparse and symmetric with rows that sum to 1, "
    "||W||_2 = 0.95, W Gaussian or orthogonal; 1e-4 relative, at most 300 evaluations, several draws. Evaluations: the "
    "median over the draws, and the most. Residuals: of the returned z in float64, the worst of all draws, over graphs "
    "and over single nodes. What a tolerance holds for is a sample: with rows a node, with segments a graph, with "
    "batch_dims=0 all of them together."
)
_PARTS: tuple[tuple[str, str, str, dict[str, Callable[[Row], str]]], ...] = (
    (
        "digits",
        "torchdeq's training of the digits",
        _DIGITS,
        {
            **_ROW,
            "epochs": _text("epochs"),
            **_TIME,
            "f": _number("calls"),
            "VJPs": _number("vjps"),
            "right": _number("accuracy"),
            "state": _small("residual"),
            "gradient": _small("gradient_residual"),
            **_ASKED,
        },
    ),
    (
        "sines",
        "An MLP with sines",
        _SINES,
        {
            **_ROW,
            **_TIME,
            "of that f": _number("f_ms"),
            "f": _text("calls"),
            "VJPs": _text("vjps"),
            "residual": _small("residual"),
            "gradient error": _small("gradient_error"),
            **_ASKED,
        },
    ),
    (
        "overhead",
        "Against `dq.fixed_point`",
        _OVERHEAD,
        {"B x N": _text("size"), "f": _text("f"), "solver": _text("solver"), **_ROW, **_TIME, **_ASKED},
    ),
    (
        "scipy",
        "SciPy's Anderson",
        _SCIPY,
        {
            "systems x N": _text("size"),
            **_ROW,
            "evaluations": _text("calls"),
            **_TIME,
            "of that F": _number("f_ms"),
            "largest F": _small("residual"),
            **_ASKED,
        },
    ),
    (
        "graph",
        "A graph, by what a sample is",
        _GRAPH,
        {
            "W": _text("W"),
            **_ROW,
            "evaluations": _number("calls"),
            "most": _text("most_calls"),
            "draws converged": _draws,
            "worst graph": _small("residual"),
            "worst node": _small("node_residual"),
            **_ASKED,
        },
    ),
)
