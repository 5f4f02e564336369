"""Streams that recordings are captured on, and what a failed capture leaves behind, without a device."""

import contextlib
import ctypes
import gc

import pytest
import torch

from deqfast.graphs import recorder, streams

CPU = torch.device("cuda", 0)  # never touched: what would touch it is replaced


class Owner:
    pass


@pytest.fixture
def calls(monkeypatch):
    found = []
    monkeypatch.setattr(streams, "_idle", {})
    monkeypatch.setattr(streams, "_new", lambda index: found.append(("new", index)) or object())
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: found.append("clear"), raising=False)
    return found


def test_no_two_living_recordings_share_a_stream(calls):
    owners = [Owner() for _ in range(40)]  # torch's own streams are 32, and take turns
    borrowed = [streams.borrow(CPU, owner) for owner in owners]
    assert len({id(stream) for stream in borrowed}) == 40
    assert calls == [("new", 0)] * 40


def test_a_stream_that_comes_back_is_used_again_without_what_was_noted_for_it(calls):
    first, second = Owner(), Owner()
    stream, other = streams.borrow(CPU, first), streams.borrow(CPU, second)
    del first
    gc.collect()
    third = Owner()
    assert streams.borrow(CPU, third) is stream
    assert streams.borrow(torch.device("cuda", 1), Owner()) not in (stream, other)
    assert calls == [("new", 0), ("new", 0), "clear", ("new", 1)]


class Driver:
    def __init__(self, error):
        self.error, self.flags = error, []

    def cuStreamCreate(self, handle, flags):
        self.flags.append(flags)
        ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))[0] = 0x51
        return self.error


@pytest.fixture
def driver(monkeypatch):
    found = Driver(0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("", (), {"synchronize": lambda self: None})())
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda pointer, device: (pointer, device))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: found)
    return found


def test_streams_are_the_drivers_and_do_not_block(driver):
    assert streams._new(1) == (0x51, 1)
    assert driver.flags == [1]


def test_a_driver_that_makes_no_stream_says_why(driver):
    driver.error = 2
    with pytest.raises(RuntimeError, match="no stream to capture on: CUDA error 2"):
        streams._new(0)


class Torch:
    """What of torch a failed capture meets; ``ended``: torch has ended the capture in its pool by itself."""

    def __init__(self, monkeypatch, ended):
        self.ended = ended
        self.done: list = []
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, getattr(self, name), raising=False)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda **options: "graph")
        monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "current")
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: self.done.append(("back to", stream)))
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *shape, device: zeros(*shape))

    def _cuda_endAllocateToPool(self, index, pool):
        if self.ended:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.done.append(("end", index, pool))

    def _cuda_releasePool(self, index, pool):
        self.done.append(("release", index, pool))

    @contextlib.contextmanager
    def graph(self, graph, stream, **options):
        self.done.append(("capture", stream))
        yield
        self.done.append(("captured", stream))


def _fails():
    raise RuntimeError("operation not permitted when stream is capturing")


def test_after_a_failed_capture_the_pool_is_ended_and_released_and_a_capture_succeeds(monkeypatch):
    found = Torch(monkeypatch, ended=False)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        recorder.Recorder().record(_fails, CPU, stream="own", pool=(0, 7), keep=False)
    assert found.done == [
        ("capture", "own"), ("back to", "current"), ("end", 0, (0, 7)), ("release", 0, (0, 7)),
        ("capture", "own"), ("captured", "own"),
    ]  # fmt: skip


def test_a_pool_that_torch_has_ended_is_not_released_twice(monkeypatch):
    found = Torch(monkeypatch, ended=True)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        recorder.Recorder().record(_fails, CPU, stream="own", pool=(0, 7), keep=True)
    assert [done[0] for done in found.done] == ["capture", "back to", "capture", "captured"]


def test_a_capture_that_succeeds_needs_none_of_it(monkeypatch):
    found = Torch(monkeypatch, ended=False)
    assert recorder.Recorder().record(lambda: None, CPU, stream="own", pool=(0, 7), keep=False) == "graph"
    assert found.done == [("capture", "own"), ("captured", "own")]
