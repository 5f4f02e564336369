"""A compiler without a past."""

from collections.abc import Iterator

import pytest
import torch
from compiled_models import counters

from deqfast.compiled import get_eval_frame_callback  # type: ignore[attr-defined]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    assert get_eval_frame_callback() is None
