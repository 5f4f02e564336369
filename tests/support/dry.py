"""Stands in for ``torch.cuda`` where the tests of a GPU are tried on CPU tensors: DEQFAST_TEST_DRY=1.

Streams keep no order. A test that fails here would fail on a device for its own sake.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class Stream:
    """A stream of operations that have all ended."""

    def __init__(self, device: Any = None) -> None:
        self.device = device

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)

    def synchronize(self) -> None:
        pass


@contextlib.contextmanager
def stream(chosen: Stream) -> Iterator[None]:
    assert isinstance(chosen, Stream)
    yield


def current_stream(device: Any = None) -> Stream:
    return Stream(device)


def synchronize(device: Any = None) -> None:
    pass


def device_count() -> int:
    return 1


def set_sync_debug_mode(mode: str) -> None:
    assert mode in ("default", "warn", "error")


def clear_workspaces() -> None:
    """Of matrix products, which the CPU keeps none for."""
