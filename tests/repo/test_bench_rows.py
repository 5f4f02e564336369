"""The benchmark of batches that shrink counts what f sees, and its section says it."""

import torch

from bench import rows
from bench.report.rows import rows_checks, rows_section


def small() -> rows.Case:
    g = torch.Generator().manual_seed(0)
    rate = torch.full((48, 1), 0.5)
    rate[:2] = 0.95
    weight = torch.linalg.qr(torch.randn(rows.HIDDEN, rows.HIDDEN, generator=g)).Q
    return rows.Case(rows.Cell(weight, True), 0.1 * torch.randn(48, rows.HIDDEN, generator=g), rate, trains=True)


def test_rows_are_those_that_f_has_seen():
    case, seen = small(), []
    case.cell.register_forward_hook(lambda module, args, out: seen.append((len(out), torch.is_grad_enabled())))
    for way, compact in rows.WAYS.items():
        seen.clear()
        told = rows.facts(case(compact))
        assert told["rows"] == sum(count for count, grad in seen if not grad), way
        assert told["own"] <= told["rows"] <= told["evaluations"] * 48 and told["converged"] == 48
        assert (told["vjp_rows"] < told["vjps"] * 48) == (compact is not False)


def test_a_wide_cell_is_the_same_map():
    wide, narrow = (rows.Cell(torch.eye(rows.HIDDEN) * 0.5, w) for w in (True, False))
    z = torch.randn(3, rows.HIDDEN)
    assert torch.allclose(wide(z, z), narrow(z, z), atol=1e-5)


def test_the_section_has_a_line_for_each_row_and_its_targets():
    found = rows.case_rows("16 of 1,024 hard, a training step, dear f", small(), rounds=3)
    meta = {"command": "c", "device": "d", "capability": "x", "cores": 1, "threads": 1, "date": "now", "versions": {}}
    record = {"rows": found, "meta": meta, "sweep": [], "drawn": rows.drawn(2)}
    text = "\n".join(rows_section(record))
    assert text.count("16 of 1,024 hard") == len(rows.WAYS) and "standard deviation" in text
    (check,) = rows_checks(record)
    assert "plain / auto" in check[0] and "target 5" in check[1]


def test_other_schedules_are_tried_and_forecast():
    (row, *rest) = rows.sweep({"small": small()})
    assert len(rest) == len(rows.LADDERS) + len(rows.TRUSTS) - 2
    for told in (row, *rest):
        assert told["rows"] == told["forecast"] and told["shapes"] > 1
