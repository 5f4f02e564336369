"""CUDA graphs on the CPU, for tests: operations are written down as they run, and replayed into the same memory.

Like a graph, a tape runs no Python of what it recorded; unlike one, recording runs the operations as well.
"""

import contextlib
import functools

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deqfast.graphs import recorder
from deqfast.ops import contract


class Tape(TorchDispatchMode):
    recording: "Tape | None" = None

    def __init__(self):
        super().__init__()
        self.entries = []
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.paused:
            return result
        outputs = [
            t for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, torch.Tensor)
        ]
        aliases = any(r.alias_info is not None for r in func._schema.returns)
        if not aliases:
            self.entries.append(lambda: self._again(func, args, kwargs, outputs))
        elif any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments):
            self.entries.append(lambda: func(*args, **kwargs))
        return result

    @staticmethod
    def _again(func, args, kwargs, outputs):
        result = func(*args, **kwargs)
        results = [
            t for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, torch.Tensor)
        ]
        for mine, new in zip(outputs, results, strict=True):
            mine.copy_(new)

    def __enter__(self):
        Tape.recording = self
        return super().__enter__()

    def __exit__(self, *error):
        Tape.recording = None
        return super().__exit__(*error)

    def replay(self):
        with torch.no_grad():
            for entry in self.entries:
                entry()


def _tensors(result):
    return [t for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, torch.Tensor)]


class TapeRecorder(recorder.Recorder):
    """Records solves of CPU tensors on tapes."""

    def __init__(self):
        self.recorded = 0

    def why_not(self, mode, state):
        return None if state.bound.replay is not None else f"the {state.backend} backend has no reports"

    @contextlib.contextmanager
    def aside(self, device, stream):
        yield

    def random_state(self, device):
        return torch.get_rng_state()

    def record(self, run, device, stream, pool, keep):
        self.recorded += 1
        with Tape() as tape:
            run()
        return tape

    def pool(self):
        return None

    def side_stream(self, device):
        return None

    def own_stream(self, device, owner):
        return None

    def loop(self, replay, parts, made, limit):
        return TapeLoop(replay, parts, made, limit)

    def stream(self, device):
        return 0


class TapeLoop:
    """What csrc/cuda/graph_loop.cu puts together: while samples run, passes; then the rest."""

    def __init__(self, replay, parts, made, limit):
        self.running, (self.pass_, self.rest), self.made, self.limit = replay.running, parts, made, limit

    def launch(self, stream):
        steps = recorder.PASS["device"]
        self.made.fill_(1)
        while int(self.running) > 0 and int(self.made) + steps <= self.limit:
            self.pass_.replay()
            self.made += steps
        if self.rest is not None and int(self.running) > 0 and int(self.made) < self.limit:
            self.rest.replay()
            self.made.fill_(self.limit)


class TapeBackend(contract.Backend):
    """Another backend with what graphs need of its steps, so that recording can be tried without a device."""

    def __init__(self, inner):
        self.name, self.inner = inner.name, inner
        self.steps = {kind: functools.partial(TapeStep, bind) for kind, bind in inner.steps.items()}

    def why_not(self, device):
        return self.inner.why_not(device)

    def takes_residual(self, ws):
        return self.inner.takes_residual(ws)

    def automatic(self, device):
        return self.inner.automatic(device)

    def joint(self, ws):
        return self.inner.joint(ws)


class TapeStep(contract.BoundStep):
    """A step that goes onto the tape as one entry."""

    def __init__(self, bind, ws, evaluations):
        super().__init__(ws)
        self.inner = bind(ws, evaluations)
        self.counts_writes = self.inner.counts_writes  # type: ignore[misc]
        self.replay = TapeReplay(ws)
        if self.inner.quick is not None:
            self.quick = lambda cur, f, f_prev: self._noted(lambda: self._count(self.inner.quick(cur, f, f_prev)))

    def __call__(self, f, f_prev, f_rows, f_prev_rows):
        ws, cur = self.ws, self.ws.cur

        def call():
            kept, ws.cur = ws.cur, cur
            try:
                return self._count(self.inner(f, f_prev, f_rows, f_prev_rows))
            finally:
                ws.cur = kept

        return self._noted(call)

    def _count(self, running):
        self.replay.running.fill_(running)
        return running

    def _noted(self, call):
        tape = Tape.recording
        if tape is None:
            return call()
        tape.entries.append(call)
        tape.paused = True
        try:
            call()
        finally:
            tape.paused = False
        return self.ws.layout.B


class TapeReplay(contract.Replay):
    def __init__(self, ws):
        self.running, self.B, self.reports = torch.zeros(1, dtype=torch.int32), ws.layout.B, []

    def renew(self):
        self.running.fill_(self.B)

    def rewind(self, evaluations):
        self.reports.clear()

    def report(self, lag):
        self.reports.append(int(self.running))
        return self.reports[-1 - lag] if len(self.reports) > lag else self.B


@contextlib.contextmanager
def taped_backends():
    """Every registered backend in the guise of a ``TapeBackend``."""
    originals = list(contract.backends())
    replace_backends([TapeBackend(backend) for backend in originals])
    try:
        yield
    finally:
        replace_backends(originals)


def replace_backends(new):
    for name in contract.names():
        contract.unregister(name)
    for backend in new:
        contract.register(backend)
