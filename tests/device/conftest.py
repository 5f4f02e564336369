"""Where the tests of a GPU are tried on CPU tensors, graphs are tapes."""

from __future__ import annotations

import pytest
import tape
from gpu import DRY

from deqfast import graphs
from deqfast.graphs import recorder


@pytest.fixture(autouse=DRY)
def taped(monkeypatch):
    monkeypatch.setattr(recorder, "RECORDER", tape.TapeRecorder())
    graphs.clear()
    with tape.taped_backends():
        yield
    graphs.clear()
