"""CUDA graphs on the CPU, for tests: operations are written down as they run, and replayed into the same memory.

Like a graph, a tape runs no Python of what it recorded; unlike one, recording runs the operations as well.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deqfast import graphs, ops


class Tape(TorchDispatchMode):
    recording = None

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


class TapeRecorder(graphs.Recorder):
    """Records solves of CPU tensors on tapes."""

    def __init__(self):
        self.recorded = 0

    def why_not(self, mode, state):
        return None if hasattr(state.update, "report") else f"the {state.backend} backend has no reports"

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

    def own_stream(self, device):
        return None

    def loop(self, state, parts, made, limit):
        return TapeLoop(state, parts, made, limit)

    def stream(self, device):
        return 0


class TapeLoop:
    """What csrc/cuda/graph_loop.cu puts together: while samples run, passes; then the rest."""

    def __init__(self, state, parts, made, limit):
        self.running, (self.pass_, self.rest), self.made, self.limit = state.update.running, parts, made, limit

    def launch(self, stream):
        steps = graphs.PASS["device"]
        self.made.fill_(1)
        while int(self.running) > 0 and int(self.made) + steps <= self.limit:
            self.pass_.replay()
            self.made += steps
        if self.rest is not None and int(self.running) > 0 and int(self.made) < self.limit:
            self.rest.replay()
            self.made.fill_(self.limit)


def bind_reporting(ws, backend, evaluations=0):
    """``ops.bind`` with what graphs need of a step; every backend's, so that it can be tried without a device."""
    update = _bind(ws, backend, evaluations)
    running = torch.zeros(1, dtype=torch.int32)
    reports = []

    def noted(call):
        tape = Tape.recording
        if tape is None:
            return call()
        tape.entries.append(call)
        tape.paused = True
        try:
            return call()
        finally:
            tape.paused = False

    def step(f, f_prev, f_rows, f_prev_rows):
        cur = ws.cur

        def call():
            kept, ws.cur = ws.cur, cur
            try:
                count = update(f, f_prev, f_rows, f_prev_rows)
            finally:
                ws.cur = kept
            running.fill_(count)
            return count

        count = noted(call)
        return ws.layout.B if Tape.recording is not None else count

    if hasattr(update, "dense"):

        def dense(cur, f, f_prev):
            def call():
                count = update.dense(cur, f, f_prev)
                running.fill_(count)
                return count

            count = noted(call)
            return ws.layout.B if Tape.recording is not None else count

        step.dense = dense

    def report(lag):
        reports.append(int(running))
        return reports[-1 - lag] if len(reports) > lag else ws.layout.B

    def rewind(evaluations):
        reports.clear()

    def renew():
        running.fill_(ws.layout.B)

    step.failed = lambda: int((ws.int_row(ops.workspace.Int.STATUS) > 1).sum())
    step.report, step.rewind, step.renew, step.running = report, rewind, renew, running
    return step


_bind = ops.bind
