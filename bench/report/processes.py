"""The sections on segments, and on solves that several processes share."""

from __future__ import annotations

from bench.report.markdown import Results, number, provenance, table, verdict

SEGMENTS = """One thread, processor time, 20 evaluations of a nearly free f. Segments of one length beside the batch
that they are, of unequal lengths beside one block padded to the longest. Memory is that of the history; beside it, how
many times that of the rows themselves it is. What takes more than 1 GB of it was not solved."""
SCALING = """Pools of 1, 2 and 4 gloo processes on one machine, in turns; one process has a thread a core, the others
one thread each. *strong*: one sample of the same size spread over them. *weak*: of a size a process. *alone*: the same
without a group. *together* and *consensus*: a batch in every process, `stop="all"` and `stop="consensus"`. f is
elementwise and local."""


def checks(record: Results) -> list[list[str]]:
    """What is held against targets, as rows of their table."""
    held = [*record.get("held", []), *(row["held"] for row in record["rows"] if "held" in row)]
    return [[told["what"], verdict(told["value"], told["asked"], at_most=told["at_most"])] for told in held]


def segments_section(record: Results) -> list[str]:
    cells = []
    for row in record["rows"]:
        took = f"{number(row['ms'])} ({number(row['ms_low'])} to {number(row['ms_high'])})" if "ms" in row else "-"
        memory = f"{number(row['history_bytes'] / 2**20)} ({number(row['history_bytes'] / row['state_history_bytes'])})"
        asked = ""
        if "held" in row:
            told = row["held"]
            asked = f"{told['what']}: {verdict(told['value'], told['asked'], at_most=told['at_most'])}"
        elif "over_padded" in row:
            asked = f"over padded: {number(row['over_padded']['ratio'])}"
        cells.append([row["case"], row["backend"], row["solver"], row["row"], took, memory, asked])
    header = ["segments", "backend", "solver", "as", "ms", "MB (times the rows)", "target"]
    return ["## Segments", provenance(record["meta"], of_the_processor=True), SEGMENTS, table(header, cells)]


def scaling_section(record: Results) -> list[str]:
    cells = []
    for row in record["rows"]:
        took = f"{number(row['us'])} ({number(row['us_low'])} to {number(row['us_high'])})"
        cells.append([str(row["processes"]), row["row"], took])
    return [
        "## Several processes",
        provenance(record["meta"]),
        SCALING,
        table(["processes", "", "us an evaluation"], cells),
        table(["target", ""], checks(record)),
    ]
