"""Histories that are read piece by piece, of states that fit a CPU's tests."""

import pytest

from deqfast.ops import hosted
from deqfast.ops.codes import BLOCK
from deqfast.ops.plain import stores, streamed

PIECE = 2 * BLOCK


@pytest.fixture
def device(monkeypatch):
    """The CPU as a device with memory of its own, and small pieces."""
    monkeypatch.setattr(hosted, "SHARED", ())
    monkeypatch.setattr(hosted, "LEAST", PIECE)
    monkeypatch.setattr(hosted, "MOST", PIECE)


@pytest.fixture
def narrow(monkeypatch):
    """Histories that are narrower than the products are read piece by piece, however small."""
    monkeypatch.setattr(streamed, "WIDE_MOST", -1)
    monkeypatch.setattr(stores, "IN_CACHE", PIECE)
