"""Capturing and replaying on a CUDA device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..loop.state import SolverState
from ..ops.contract import Loop, Replay
from ..ops.lag import capturing
from . import streams

PASS = {"graph": 4, "device": 2}  # evaluations in a pass; even, so that a pass ends in the buffer it began in


class CannotRecord(Exception):
    """Why a solve cannot be a CUDA graph."""


class Recorder:
    """Capturing and replaying on a CUDA device."""

    def why_not(self, mode: str, state: SolverState) -> str | None:
        """Why solves like ``state`` cannot be recorded, or None."""
        device = state.layout.device
        if device.type != "cuda":
            return f"device {device} has no graphs"
        replay = state.bound.replay
        if replay is None:
            return f"steps of the {state.backend} backend cannot be captured"
        if mode == "device" and (reason := replay.why_no_loop()) is not None:
            return f"there is no loop on the device for backend {state.backend!r}: {reason}"
        return None

    @contextlib.contextmanager
    def aside(self, device: torch.device, stream: Any) -> Iterator[None]:
        """Run on ``stream``, in order with the current one."""
        current = torch.cuda.current_stream(device)
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            current.wait_stream(stream)

    def random_state(self, device: torch.device) -> Tensor:
        """The state of the generator that f draws from, if it does."""
        return torch.cuda.get_rng_state(device)

    def record(self, run: Callable[[], None], device: torch.device, stream: Any, pool: Any, keep: bool) -> Any:
        """A graph of what ``run`` launches, with ``replay``; ``keep`` it open for a loop on the device."""
        graph = torch.cuda.CUDAGraph(keep_graph=True) if keep else torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            current = torch.cuda.current_stream(device)
            try:
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    run()
            except BaseException:
                torch.cuda.set_stream(current)  # a capture that fails at its end leaves its stream behind
                unwind(torch.cuda.current_device(), pool, stream)
                raise
        return graph

    def capturing(self, device: torch.device) -> bool:
        """Whether the caller captures a graph of his own."""
        return capturing(device)

    def side_stream(self, device: torch.device) -> Any:
        """A stream for what has to run once before it is captured."""
        return torch.cuda.Stream(device)

    def own_stream(self, device: torch.device, owner: object) -> Any:
        """A stream for the captures of one recording, as long as it lives."""
        return streams.borrow(device, owner)

    def pool(self) -> Any:
        """Memory that the graphs of one recording share."""
        return torch.cuda.graph_pool_handle()

    def loop(self, replay: Replay, parts: tuple[Any, Any], made: Tensor, limit: int) -> Loop:
        """The loop on the device over a pass and the rest."""
        try:
            return replay.loop(*parts, PASS["device"], made, limit)
        except ValueError as error:
            raise CannotRecord(str(error)) from error

    def stream(self, device: torch.device) -> int:
        """The current stream as a number."""
        return torch.cuda.current_stream(device).cuda_stream


def unwind(index: int, pool: Any, stream: Any) -> None:
    """After a capture that failed: what torch leaves undone where the failure shows at its end.

    Up to 2.11 torch goes on handing out the device's memory from the graph's pool, never frees that, and takes the
    default generator for one that is being captured, so that the next random number raises (pytorch 180395, 176752).
    """
    try:
        torch._C._cuda_endAllocateToPool(index, pool)
    except RuntimeError:
        pass  # torch has done so, and counts who uses the pool
    else:
        torch._C._cuda_releasePool(index, pool)
    with contextlib.suppress(RuntimeError):  # of a device that answers no more: what is raised is why
        flag = torch.zeros(1, device=f"cuda:{index}")
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            flag.zero_()  # a capture that succeeds takes the generator along to its end


RECORDER = Recorder()
