"""The sections on how Anderson's columns are kept, and on what their rounding costs."""

from __future__ import annotations

from bench.report.markdown import Results, number, provenance, table

HISTORY = """One sample of float32 numbers, one thread, processor time of a step of full history with its nearly free f;
MB of 2^20 bytes. *grows*: by how much the process does at the most while the history fills, iterates and f's outputs
included; in brackets, how many times the state that is. *as a whole*: backend "torch" with its columns in float32 too,
which it does up to 1 GB of them; *in pieces*: as it does beyond. *in the host's memory*: `history_device="cpu"`, with
a CPU in the place of the device, so that no link is crossed; *on the device* is what it takes beside the columns.
**It has not run on a GPU.**"""
ROUNDING = """Evaluations to a relative residual (geometric mean, failures at 300) over the convergence suite with ten
columns and ridge 1e-4. dF and dG are rounded as a history would hold them, all else is in float64; problems whose noise
allows no such residual are left out of it."""
WHERE = {"device": "as a whole", "pieces": "in pieces", "host": "in the host's memory"}
SIZES = ("history_bytes", "peak_bytes", "device_bytes")
KINDS = ("forward", "adjoint")


def history_section(record: Results) -> list[str]:
    cells = []
    for row in record["rows"]:
        where = "" if row["backend"] == "native" else WHERE[row["where"]]
        sizes = [f"{number(row[key] / 2**20)} ({number(row[key] / row['state_bytes'])})" for key in SIZES]
        took = f"{number(row['ms'])} ({number(row['ms_low'])} to {number(row['ms_high'])})"
        kept = f"{row['dtype']} {where}".strip()
        cells.append([f"{row['N']:,}", str(row["m"]), row["backend"], kept, took, *sizes])
    header = ["N", "m", "backend", "columns", "ms a step", "columns, MB", "grows, MB", "on the device, MB"]
    return ["## Large states", provenance(record["meta"], of_the_processor=True), HISTORY, table(header, cells)]


def rounding_section(record: Results) -> list[str]:
    header = ["stored", *(f"{kind} {t:g}" for kind in KINDS for t in record["tolerances"])]
    cells = [
        [row["stored"], *(f"{number(mean)} / {failed:.1f} %" for kind in KINDS for mean, failed in row[kind])]
        for row in record["rows"]
    ]
    return ["## Rounded columns", provenance(record["meta"], of_the_processor=True), ROUNDING, table(header, cells)]
