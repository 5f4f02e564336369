"""Training a DEQ under DDP and FSDP2 gives the gradients of one process."""

from __future__ import annotations

import parallel_models
import pytest
from ranks import all_well, run_ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return all_well(run_ranks(tmp_path_factory.mktemp("ranks"), "parallel_models:train", 2))


@pytest.mark.host
@pytest.mark.parametrize("name", parallel_models.CASES)
def test_gradients_are_those_of_one_process(found, name):
    right = parallel_models.alone(name)
    for rank in found:
        assert rank[name].keys() == right.keys()
        for key, grad in right.items():
            got = rank[name][key]
            if grad is None:  # what only the start uses: nothing, or zeros that DDP puts there
                assert key.startswith("deq.cell.first") and (got is None or not bool(got.any()))
                continue
            assert float((got - grad).norm()) <= 1e-6 * float(grad.norm()), key
