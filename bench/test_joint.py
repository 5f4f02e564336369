"""Time of one joint step, all columns in use, float32 state; see bench/joint.py.

The figures are in extra_info: rows taken in turns within one run. Targets: 90 % of the byte floor at the copy bandwidth
of the same run, and 4 times the same step in torch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest

from bench import joint

_compare = lru_cache(maxsize=1)(joint.compare)  # the rows of a size hold GBs


@pytest.mark.parametrize("row", (*joint.HISTORY, "torch"))
@pytest.mark.parametrize("size", list(joint.SHAPES))
def test_joint(benchmark: Any, request: pytest.FixtureRequest, size: str, row: str) -> None:
    quick = request.config.getoption("--quick", default=False)
    if quick and size not in joint.QUICK:
        pytest.skip("not in the quick subset")
    facts, rows = _compare(size, 3 if quick else 15)
    benchmark.group = f"Joint {size}"
    benchmark.extra_info.update(facts[row], row=row)
    benchmark.pedantic(rows[row].step, setup=lambda: ((rows[row].evaluate(),), {}), rounds=5, warmup_rounds=0)
