"""The benchmarks of how columns are kept: codecs are those of the histories, and every row that is measured is told."""

import json
import re
import sys

import pytest
import torch
from problems import problem

import deqfast as dq
from bench import history, rounding
from bench.report.history import history_section, rounding_section
from deqfast.ops.plain import streamed
from deqfast.ops.plain.codec import decode, encode

pytestmark = pytest.mark.host


@pytest.mark.parametrize("way", ["bfloat16", "float16", "int8"])
def test_codecs_round_as_histories_do(way):
    dtype = getattr(torch, way)
    ws = dq.Anderson(m=3, history_dtype=dtype).init(torch.zeros(2, 2500, dtype=torch.float64)).ws
    column = torch.randn(2, 2500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, _ = (codec(column) for codec in rounding.WAYS[way])
    assert torch.equal(found, decode(ws, *encode(ws, column))) and not torch.equal(found, column)
    error = (rounding.to_largest(column) - column).abs()
    assert bool((error <= column.abs().max() / 254).all()) and bool(error.any())


def test_nothing_is_rounded_afterwards():
    p = problem(2, 40, dtype=torch.float64, slowest=0.9)
    solver = rounding.SOLVER

    def third() -> torch.Tensor:
        state = solver.init(p.z0, rtol=0.0, backend="torch")
        for _ in range(3):
            state.step(0.5 * state.z.cos() + p.x)
        return state.z.clone()

    before = third()
    with rounding.stored_by(rounding.WAYS["int8"]):
        assert not torch.equal(third(), before)
    with rounding.stored_by(rounding.WAYS["float64"]):
        assert torch.equal(third(), before)
    assert torch.equal(third(), before)


def test_evaluations_by_rounding_are_reported(tmp_path, capsys):
    out = tmp_path / "rounding.json"
    rounding.main(["--problems", "linear/non-normal .9", "--out", str(out)])
    record = json.loads(out.read_text())
    assert [row["stored"] for row in record["rows"]] == list(rounding.WAYS)
    assert len(capsys.readouterr().out.splitlines()) == len(rounding.WAYS)
    for row in record["rows"]:
        assert row["adjoint"] == [] and [1 < mean < 300 for mean, _ in row["forward"]] == [True] * 3
    record["rows"][0]["adjoint"] = [[7.25, 12.5]] * 3
    text = "\n".join(rounding_section(record))
    assert text.count("7.25 / 12.5 %") == 3


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells sizes of processes")
def test_memory_and_time_of_every_way_are_reported(tmp_path, capsys):
    out, before, threads = tmp_path / "history.json", streamed.WIDE_MOST, torch.get_num_threads()
    history.main(["--quick", "--out", str(out)])
    assert before == streamed.WIDE_MOST and torch.get_num_threads() == threads
    record = json.loads(out.read_text())
    rows = {(row["backend"], row["where"], row["dtype"]): row for row in record["rows"]}
    assert list(rows) == history.WAYS
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
    for row in rows.values():
        assert row["ms"] > 0 and row["peak_bytes"] > row["history_bytes"]
        beside = row["history_bytes"] if row["where"] == "host" else 0
        assert row["device_bytes"] == row["peak_bytes"] - beside
    text = "\n".join(history_section(record))
    assert len(re.findall(r"^\| 400,000 \|", text, re.MULTILINE)) == len(rows)
