"""Where the GPU benchmark runs and how it takes time there; a dry run takes the same paths on CPU tensors.

Device time is that of steps captured in a CUDA graph and replayed between two events: no Python between kernels, the
gaps between kernels included. Wall time, for whole solves, is the host's clock around calls that end with a
synchronisation; rivals take turns (bench/timing.py).
"""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

Call = Callable[[], object]


class Place:
    """A device, the sizes for it, and the time left."""

    def __init__(self, device: str, budget: float, quick: bool) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.quick = quick
        self.end = time.monotonic() + budget
        self.left_out: list[str] = []

    def late(self, what: str) -> bool:
        """Whether the budget is spent; notes what is not measured for it."""
        if time.monotonic() <= self.end:
            return False
        self.left_out.append(what)
        return True

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def finished(self, call: Call) -> Call:
        """``call``, and everything it launched."""

        def run() -> None:
            call()
            self.synchronize()

        return run

    def capture(self, run: Call) -> Call:
        """What ``run`` launches, to be replayed; ``run`` has been called before."""
        if not self.cuda:
            return run
        graph = torch.cuda.CUDAGraph()
        self.synchronize()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def microseconds(self, replay: Call, times: int, rounds: int) -> list[float]:
        """Device time of one ``replay``, measured over ``times`` of them, ``rounds`` times."""
        replay()
        self.synchronize()
        taken = []
        for _ in range(rounds):
            if self.cuda:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(times):
                    replay()
                end.record()
                end.synchronize()
                taken.append(1e3 * begin.elapsed_time(end) / times)
            else:
                start = time.perf_counter()
                for _ in range(times):
                    replay()
                taken.append(1e6 * (time.perf_counter() - start) / times)
        return taken

    def in_turns(self, replays: dict[str, tuple[Call, int]], rounds: int) -> dict[str, list[float]]:
        """Device microseconds a unit of work, rows in turns; a row is (replay, units of work in one)."""
        repeats = {}
        for name, (replay, units) in replays.items():
            once = statistics.median(self.microseconds(replay, 1, 3))
            repeats[name] = max(1, min(200, round(5e3 / max(once, 1.0)))), units
        taken: dict[str, list[float]] = {name: [] for name in replays}
        names = list(replays)
        for turn in range(rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                times, units = repeats[name]
                taken[name] += [us / units for us in self.microseconds(replays[name][0], times, 1)]
        return taken

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Raises where torch waits for the device."""
        self.synchronize()
        self._debug_mode("error")
        try:
            yield
        finally:
            self._debug_mode("default")

    def _debug_mode(self, mode: str) -> None:
        if self.cuda:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says that the mode is a prototype
                torch.cuda.set_sync_debug_mode(mode)

    def kernels(self, run: Call, steps: int) -> dict[str, Any]:
        """Launches a step and their durations by the profiler, which may be forbidden on a machine."""
        if not self.cuda:
            return {"launches": None, "why": "no GPU"}
        from torch.profiler import ProfilerActivity, profile

        run()
        self.synchronize()
        try:
            with profile(activities=[ProfilerActivity.CUDA]) as found:
                run()
                self.synchronize()
            events = [e for e in found.events() if "CUDA" in str(e.device_type)]
        except RuntimeError as error:
            return {"launches": None, "why": str(error).splitlines()[0]}
        own = [e for e in events if not e.name.startswith(("Memcpy", "Memset")) and "Synchronize" not in e.name]
        if not own:
            return {"launches": None, "why": "the profiler saw no kernel"}
        busy = sum(e.time_range.elapsed_us() for e in own)
        names = sorted({e.name.split("<")[0].split("(")[0].split("::")[-1] for e in own})
        return {"launches": len(own) / steps, "us_busy": busy / steps, "kernels": names}


def spread(taken: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(taken) < 2:
        return {"us": taken[0], "us_low": taken[0], "us_high": taken[0]}
    low, _, high = statistics.quantiles(taken, n=4, method="inclusive")
    return {"us": statistics.median(taken), "us_low": low, "us_high": high}
