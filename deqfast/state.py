"""The state of a solve between two evaluations of f, and the checks around one step.

f's output is read where it lies and kept, uncopied, until the next step needs it as the previous value. That is safe
only while nobody writes to it, so every step looks at storage and version: an output buffer that f uses again, an
iterate returned as is, or one changed in place is copied from then on.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import compiled, ops
from .ops.layout import Layout
from .ops.workspace import AndersonWorkspace, At, Int, Real, Workspace
from .status import Status

DEFAULT_RTOL = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def check_number(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a real number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_stopping(
    rtol: float | None, atol: float, max_iter: int | None, dtype: torch.dtype
) -> tuple[float, float, int]:
    """Validated (rtol, atol, max_iter); rtol None becomes the default of the dtype, max_iter None becomes 0."""
    rtol = DEFAULT_RTOL[dtype] if rtol is None else rtol
    for name, value in (("rtol", rtol), ("atol", atol)):
        check_number(name, value)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    if max_iter is None:
        return float(rtol), float(atol), 0
    if isinstance(max_iter, bool) or not isinstance(max_iter, int):
        raise TypeError(f"max_iter must be an int, got {type(max_iter).__name__}")
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    if max_iter >= 2**31:
        raise ValueError(f"max_iter must be below 2**31, got {max_iter}")
    return float(rtol), float(atol), max_iter


_NOTHING = contextlib.nullcontext()


def _version(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version


def _storages(leaves: list[Tensor]) -> list[int]:
    return [t.untyped_storage().data_ptr() for t in leaves]


class Solver:
    """Options of a solver: an immutable value, shared freely between solves and threads."""

    @property
    def uses_previous(self) -> bool:
        """Whether a step reads f at the previous iterate."""
        return False

    def workspace(self, layout: Layout, *, rtol: float, atol: float, max_iter: int, keep_best: bool) -> Workspace:
        """The memory this solver needs for states of ``layout``."""
        raise NotImplementedError

    @compiled.skip
    def init(
        self,
        z0: Any,
        *,
        rtol: float | None = None,
        atol: float = 0.0,
        max_iter: int | None = None,
        backend: str = "auto",
    ) -> SolverState:
        """A state for a loop of your own, starting at a copy of ``z0``; see ``SolverState``.

        Args:
            z0: tensor (B, ...) or a tree of tensors that share dim 0.
            rtol: a sample stops at ||f(z) - z|| <= atol + rtol ||f(z)||. Default by dtype: 1e-8 float64, 1e-4 float32,
                4e-3 float16, 2e-2 bfloat16.
            atol: absolute part of the same, default 0.
            max_iter: evaluations at most; None: no limit.
            backend: "auto", "native", "triton" or "reference".
        """
        return SolverState(self, z0, rtol=rtol, atol=atol, max_iter=max_iter, backend=backend)


class SolverState:
    """One solve in progress, for a loop of your own.

    ::

        state = dq.Anderson(m=6).init(z0, rtol=1e-4)
        while not state.done:
            state.step(f(state.z))

    Attributes:
        nfe: evaluations of f that have been fed to ``step``.
        backend: the backend that runs the updates.
        layout: structure and sizes of the state.
    """

    def __init__(
        self,
        options: Solver,
        z0: Any,
        *,
        rtol: float | None = None,
        atol: float = 0.0,
        max_iter: int | None = None,
        keep_best: bool = True,
        backend: str = "auto",
        layout: Layout | None = None,
    ) -> None:
        self.options = options
        self.layout = Layout(z0) if layout is None else layout
        rtol, atol, limit = check_stopping(rtol, atol, max_iter, self.layout.dtype)
        self.backend = ops.choose(backend, self.layout.device)
        self._backend_asked_for = backend
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else _NOTHING:
            try:
                self.ws: Workspace = options.workspace(
                    self.layout, rtol=rtol, atol=atol, max_iter=limit, keep_best=keep_best
                )
            except torch.OutOfMemoryError as error:
                raise torch.OutOfMemoryError(
                    f"no room for the history of {options} for {self.layout.B} samples of {self.layout.N} numbers: "
                    f"keep fewer columns, Anderson's in a narrower history_dtype, or solve a smaller batch. {error}"
                ) from error
        self.nfe = 0
        self._uses_previous = options.uses_previous
        self._running = self.layout.B if self.layout.N else 0
        self._z0 = [z0.detach()] if self.layout.single else [t.detach() for t in pytree.tree_leaves(z0)]
        for x, t in zip(self.ws.x[0], self._z0, strict=True):
            x.copy_(t)
        self._own_residual = False
        self._previous: list[Tensor] | None = None  # f at the previous iterate, as the next step will read it
        self._previous_rows: Tensor | None = None
        self._origin: list[Tensor] = []  # what f returned last, kept alive so that its address is not reused
        self._origin_versions: list[int] = []
        self._origin_storages: list[int] = []
        self._copies: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._copy_f = self._copy_z = False
        self._showing = False  # while a callback looks, every iterate it asks for is a copy
        self._bind()

    def _bind(self) -> None:
        self._update: ops.Step = ops.bind(self.ws, self.backend, self.nfe)
        self._x_storages = _storages([*self.ws.x[0], *self.ws.x[1]])
        self._note_versions()
        first = self.layout.leaves[0]
        self._dense: Callable[[int, int, int], int] | None = getattr(self._update, "dense", None)
        self._shape, self._dtype = first.shape, first.dtype
        self._device_index = -1 if self.layout.device.type == "cpu" else self.layout.device.index
        self._look_plain()

    def _look_plain(self) -> None:
        """Whether the next step may take the short way."""
        self._plain = (
            self._dense is not None
            and self.layout.single
            and not self._z0  # the first step settles whether f leaves its input and output alone
            and not (self._copy_f or self._copy_z)
            and (not self._uses_previous or (bool(self._origin) and self._previous_is_plain()))
        )

    def _previous_is_plain(self) -> bool:
        if self._previous is None:
            return True
        t = self._previous[0]
        return self._previous_rows is None and t.dtype is self._dtype and t.is_contiguous() and not t.is_neg()

    def _note_versions(self) -> None:
        self._x_versions = [[_version(t) for t in buffer] for buffer in self.ws.x]

    @property
    @compiled.skip
    def z(self) -> Any:
        """The iterate to evaluate f at, structured like z0; valid until the next step."""
        ws = self.ws
        x = ws.x[ws.cur]
        if self._plain and not self._showing:
            return x[0]
        if self._z0 and self._z_changed():  # by a call of f that did not end in a step
            self._restore_z()
        return self.layout.unflatten([t.clone() for t in x] if self._copy_z or self._showing else x)

    @property
    @compiled.skip
    def copies_z(self) -> bool:
        """Whether f was seen to write into the iterate it is given, so that it gets copies."""
        return self._copy_z

    @property
    @compiled.skip
    def done(self) -> bool:
        """True when no sample is known to run any more.

        On a GPU that becomes known up to two steps late, without waiting for the device; surplus steps change nothing.
        """
        return self._running == 0

    @property
    @compiled.skip
    def known_running(self) -> int:
        """How many samples still ran when the host last heard: exact on a CPU, else that many or fewer run now."""
        return self._running

    @compiled.skip
    def failed(self) -> int:
        """How many samples ended without having converged; waits for the device, and knows nothing under capture."""
        count = getattr(self._update, "failed", None)
        return int((self.status > Status.CONVERGED).sum()) if count is None else int(count())

    @property
    @compiled.skip
    def running(self) -> Tensor:
        """(B,) bool: samples that have not stopped."""
        return self.ws.int_row(Int.STATUS) == Status.RUNNING

    @property
    @compiled.skip
    def status(self) -> Tensor:
        """(B,) int32 of ``Status``."""
        return self.ws.int_row(Int.STATUS)

    @property
    @compiled.skip
    def steps(self) -> Tensor:
        """(B,) int32: evaluations each sample has used."""
        return self.ws.int_row(Int.STEPS)

    @property
    @compiled.skip
    def residual(self) -> Tensor:
        """(B,) relative residual ||f(z) - z|| / ||f(z)|| at each sample's newest evaluation."""
        return self.ws.real_row(Real.RESIDUAL)

    @compiled.skip
    def step(self, fz: Any, residual: Any = None) -> bool:
        """Take f at ``z``, move to the next iterate; returns ``done``.

        Args:
            fz: f(state.z), structured like z0. It is read in place and kept until the next step.
            residual: a residual of your own, a tensor or tree of tensors (B, ...), possibly in another space than z:
                the weights minimise it and a sample stops at ||residual|| <= atol + rtol ||f(z)||. Type II Anderson
                without mixing; give it at every step or at none. Runs on the reference backend: with backend="auto"
                the first residual moves the state there, and ``backend`` says so.

        Raises:
            TypeError, ValueError: ``fz`` has another structure, shape, dtype or device, or ``residual`` cannot be used;
                the state is as before.
        """
        if residual is not None or self._own_residual:
            return self._step_with_residual(fz, residual)
        if self._plain and fz.__class__ is Tensor and self._step_plain(fz):
            return self._running == 0
        return self.advance(self.layout.flatten(fz, "f(z)"), None)

    def _step_with_residual(self, fz: Any, residual: Any) -> bool:
        ws = self.ws
        if not isinstance(ws, AndersonWorkspace) or ws.test_space != 0 or ws.mixing != 1 or ws.m == 0:
            raise ValueError(f"residual needs dq.Anderson(type=2) with mixing=1, got {self.options}")
        if residual is None or (self.nfe and not self._own_residual):
            raise ValueError("residual must be given at every step of a solve or at none")
        self._check_serves_residual()
        layout = Layout(residual, "residual")
        if layout.B != self.layout.B:
            raise ValueError(
                f"residual must have the batch of z0, expected dim 0 to be {self.layout.B}, got {layout.B}"
            )
        rows = torch.cat(layout.rows(pytree.tree_leaves(residual)), dim=1).detach().to(self.layout.acc, copy=True)
        if ws.own_residual is not None and rows.shape != ws.own_residual.shape:
            raise ValueError(f"residual must keep its size, expected {ws.own_residual.shape[1]}, got {rows.shape[1]}")
        leaves = self.layout.flatten(fz, "f(z)")
        self._serve_residual(rows)
        return self.advance(leaves, None)

    def _check_serves_residual(self) -> None:
        free = self._backend_asked_for == "auto" and not os.environ.get("DEQFAST_BACKEND")
        if self.backend != "reference" and not free:
            raise ValueError(f"residual needs backend='auto' or 'reference', got backend={self.backend!r}")

    def _serve_residual(self, rows: Tensor) -> None:
        assert isinstance(self.ws, AndersonWorkspace)
        if self.backend != "reference":
            self.backend = "reference"
            self._update, self._dense, self._plain = ops.bind(self.ws, self.backend, self.nfe), None, False
        self.ws.set_residual(rows)
        self._own_residual = True

    def _step_plain(self, fz: Tensor) -> bool:
        """``advance`` for one contiguous tensor that needs no copy; False, with nothing done, where it might.

        At small sizes the checks around a step cost more than the step: these are the same ones, for the common case.
        """
        ws = self.ws
        cur = ws.cur
        dense = self._dense
        if (
            dense is None
            or fz.dtype is not self._dtype
            or fz.shape != self._shape
            or fz.requires_grad
            or (not fz.is_cpu if self._device_index < 0 else fz.get_device() != self._device_index)
            or not fz.is_contiguous()
            or fz.is_inference()
            or fz.is_neg()
            or ws.x[cur][0]._version != self._x_versions[cur][0]
            or self._running == 0
        ):
            return False
        if self._uses_previous:
            storage = fz.untyped_storage().data_ptr()
            if (
                storage == self._origin_storages[0]
                or storage in self._x_storages
                or self._origin[0]._version != self._origin_versions[0]
            ):
                return False
            self._running = dense(cur, fz.data_ptr(), self._previous[0].data_ptr() if self._previous else 0)
            self._previous = self._origin = [fz]
            self._origin_versions = [fz._version]
            self._origin_storages = [storage]
        else:
            if fz.untyped_storage().data_ptr() in self._x_storages:
                return False
            self._running = dense(cur, fz.data_ptr(), 0)
        ws.cur = 1 - cur
        self.nfe += 1
        return True

    @compiled.skip
    def advance(self, leaves: list[Tensor], rows: Tensor | None) -> bool:
        """``step`` for checked leaves; ``rows`` maps samples to rows of the leaves, -1 for dropped samples."""
        if self._running == 0:
            return True
        ws = self.ws
        leaves = [t.detach() if t.requires_grad else t for t in leaves]
        if self._z_changed():
            leaves = self._undo_change_of_z(leaves)
        previous = self._previous
        if self._uses_previous:
            leaves, previous = self._settle(leaves, previous)
        elif any(s in self._x_storages for s in _storages(leaves)):
            leaves = [t.clone() for t in leaves]  # a view of z: rows that stop are overwritten while others read it
        self._running = self._update(leaves, previous, rows, self._previous_rows)
        if self._uses_previous:
            self._previous, self._previous_rows = leaves, rows
        ws.cur ^= 1
        if self.backend != "native":  # torch's own writes count as versions
            self._note_versions()
        self.nfe += 1
        self._z0 = []
        self._look_plain()
        return self._running == 0

    def _settle(self, leaves: list[Tensor], previous: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor] | None]:
        """The output of f in memory that will still hold it at the next step, and the previous one if it still does."""
        storages = _storages(leaves)
        origin, versions = self._origin, self._origin_versions
        reused = any(s in self._x_storages for s in storages) or any(t.is_inference() for t in leaves)
        if origin:
            changed = any(_version(t) != v for t, v in zip(origin, versions, strict=True))
            seen = not set(storages).isdisjoint(self._origin_storages)
            if (changed or seen) and previous is origin:
                previous = None  # overwritten while it was held: one column is lost, none is wrong
            reused = reused or changed or seen
        self._copy_f = self._copy_f or reused
        self._origin = leaves
        self._origin_storages = storages
        self._origin_versions = [_version(t) for t in leaves]
        if self._copy_f or not origin:
            leaves = self._copy(leaves)
        return leaves, previous

    def _copy(self, leaves: list[Tensor]) -> list[Tensor]:
        buffers = self._copies[self.nfe & 1]
        if not buffers:
            with torch.inference_mode(False):  # the next step may be made in another mode
                buffers += self.layout.empty()
        rows = leaves[0].shape[0]
        if rows < self.layout.B:
            buffers = [b[:rows] for b in buffers]
        return [b.copy_(t) for b, t in zip(buffers, leaves, strict=True)]

    def _undo_change_of_z(self, leaves: list[Tensor]) -> list[Tensor]:
        """Mend that f wrote into its iterate: keep f's output, restore the iterate, hand out copies from now on."""
        if not self._z0:
            raise RuntimeError(
                f"f changed its input z in place at evaluation {self.nfe + 1}, after it had left it alone before; "
                "return a new tensor from f, or clone z inside it"
            )
        leaves = [t.clone() for t in leaves]
        self._restore_z()
        return leaves

    def _z_changed(self) -> bool:
        cur = self.ws.cur
        return any(_version(x) != v for x, v in zip(self.ws.x[cur], self._x_versions[cur], strict=True))

    def _restore_z(self) -> None:
        for x, t in zip(self.ws.x[self.ws.cur], self._z0, strict=True):
            x.copy_(t)
        self._note_versions()
        self._copy_z = True

    @compiled.skip
    def answer(self, returns: str = "best") -> tuple[list[Tensor], Tensor]:
        """Leaves of the returned iterate and its (B,) relative residual; samples still running are read, not moved."""
        ws = self.ws
        residual = best = self.ws.real_row(Real.BEST)
        if returns == "last":
            residual = torch.where(self.status == Status.NON_FINITE, best, self.ws.real_row(Real.RESIDUAL))
        leaves = ws.x[ws.cur]
        if self._running and self.nfe:
            running = self.running
            from_saved = running & (ws.int_row(Int.BEST_AT) == At.SAVED) & (returns == "best")
            leaves = [
                _where(from_saved, saved, _where(running, previous, current))
                for current, previous, saved in zip(leaves, ws.x[1 - ws.cur], ws.saved, strict=True)
            ]
        return leaves, residual.clone()

    @property
    def update(self) -> Any:
        """The bound step of the backend, on a GPU with what graphs need of it; see ``ops.native.bind``."""
        return self._update

    @property
    def previous(self) -> list[Tensor] | None:
        """What f returned at the previous iterate, as the next step will read it."""
        return self._previous

    def restart(self, start: list[Tensor]) -> None:
        """Begin another solve in the same memory; what was learned about f stays."""
        self.ws.reset()
        self._update.renew()  # type: ignore[attr-defined]
        for x, t in zip(self.ws.x[0], start, strict=True):
            x.copy_(t)
        self._z0 = start
        self.nfe, self._running = 0, self.layout.B
        self._hold(None)

    def resume(self, nfe: int, previous: list[Tensor] | None) -> None:
        """Go on as after ``nfe`` evaluations whose iterate is in memory already, with f at the one before."""
        self._update.rewind(nfe)  # type: ignore[attr-defined]
        self._z0 = []
        self.ws.cur = nfe & 1
        self.nfe, self._running = nfe, self.layout.B
        self._hold(previous)

    def finish(self, nfe: int) -> None:
        """Take note that every sample has stopped: its answer is in both iterates."""
        self.nfe, self._running, self._z0 = nfe, 0, []

    def _hold(self, previous: list[Tensor] | None) -> None:
        self._previous, self._previous_rows = previous, None
        self._origin = previous or []
        self._origin_versions = [_version(t) for t in self._origin]
        self._origin_storages = _storages(self._origin)
        self._note_versions()
        self._look_plain()

    def show(self, callback: Callable[[int, SolverState], bool | None]) -> bool:
        """Call ``callback(nfe, self)``, with every iterate it asks for a copy; returns whether it said stop."""
        self._showing = True
        try:
            return bool(callback(self.nfe, self))
        finally:
            self._showing = False

    @compiled.skip
    def evaluated(self) -> Any:
        """A copy of the iterate at which f was last evaluated, structured like z0."""
        ws = self.ws
        return self.layout.unflatten([t.clone() for t in ws.x[1 - ws.cur if self.nfe else ws.cur]])

    def release(self) -> None:
        """Give the history back for the next solve; answers can still be read, steps no longer made."""
        self._running = 0
        self._plain = False
        self._update, self._dense = _released, None
        self.ws.release()

    @compiled.skip
    def state_dict(self) -> dict[str, Any]:
        """Copies of everything a later step reads; ``load_state_dict`` of a state of the same shape takes it up."""
        tensors = {name: t.clone() for name, t in self.ws.tensors().items()}
        for i, t in enumerate(self._previous or []):
            tensors[f"previous.{i}"] = t.clone()
        if self._previous_rows is not None:
            tensors["previous_rows"] = self._previous_rows.clone()
        return {
            "options": repr(self.options),
            "layout": repr(self.layout),
            "nfe": self.nfe,
            "running": self._running and int(self.running.sum()),
            "copies_f": self._copy_f,
            "copies_z": self._copy_z,
            "tensors": tensors,
        }

    @compiled.skip
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue where ``saved`` stopped.

        Raises:
            ValueError: it was saved by a solver with other options or a state of another structure, shape, memory
                format or dtype, or something is missing; this state is as before.
        """
        self._check_fits(saved)
        tensors = saved["tensors"]
        if "own_residual" in tensors:
            self._serve_residual(torch.empty_like(tensors["own_residual"], device=self.layout.device))
        for name, t in self.ws.tensors().items():
            t.copy_(tensors[name])
        previous = [
            tensors[f"previous.{i}"].to(self.layout.device, copy=True)
            for i in range(len(self.layout.leaves))
            if f"previous.{i}" in tensors
        ]
        self._previous = previous or None
        rows = tensors.get("previous_rows")
        self._previous_rows = None if rows is None else rows.to(self.layout.device, copy=True)
        self._origin, self._origin_versions, self._origin_storages = [], [], []
        self._z0 = [] if saved["nfe"] else [t.clone() for t in self.ws.x[self.ws.cur]]
        self._copy_f, self._copy_z = saved["copies_f"], saved["copies_z"]
        self.nfe = saved["nfe"]
        self._running = saved["running"]
        self._bind()

    def _check_fits(self, saved: dict[str, Any]) -> None:
        for name in ("options", "layout", "nfe", "running", "copies_f", "copies_z", "tensors"):
            if name not in saved:
                raise ValueError(f"state_dict has no entry {name!r}")
        for name, own in (("options", repr(self.options)), ("layout", repr(self.layout))):
            if saved[name] != own:
                raise ValueError(f"state_dict was saved with {name} {saved[name]}, this state has {own}")
        expected = {name: (tuple(t.shape), t.dtype) for name, t in self.ws.tensors().items()}
        tensors = saved["tensors"]
        if "own_residual" in tensors:
            self._check_serves_residual()
            rows = tensors["own_residual"].shape[1:]
            expected["own_residual"] = ((self.layout.B, *rows), self.layout.acc)
            expected["own_columns"] = ((self.layout.B, getattr(self.ws, "m", 0), *rows), self.layout.acc)
        for name, (shape, dtype) in expected.items():
            got = tensors.get(name)
            if got is None or tuple(got.shape) != shape or got.dtype != dtype:
                what = "nothing" if got is None else f"{tuple(got.shape)} {got.dtype}"
                raise ValueError(f"state_dict entry {name!r}: expected {shape} {dtype}, got {what}")

    def __reduce__(self) -> Any:
        settings = {
            "rtol": self.ws.rtol,
            "atol": self.ws.atol,
            "max_iter": self.ws.max_iter or None,
            "keep_best": self.ws.keep_best,
            "backend": self._backend_asked_for,
        }
        return _rebuild, (type(self), self.options, self.evaluated(), settings, self.state_dict())

    def __deepcopy__(self, memo: dict[int, Any]) -> SolverState:
        function, args = self.__reduce__()
        return function(*args[:1], copy.deepcopy(args[1], memo), *args[2:])


def _rebuild(
    cls: type[SolverState], options: Any, z: Any, settings: dict[str, Any], saved: dict[str, Any]
) -> SolverState:
    state = cls(options, z, **settings)
    state.load_state_dict(saved)
    return state


def _released(*_: object) -> int:
    raise RuntimeError("this solve has ended and its history was given back")


def _where(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(mask.view(-1, *([1] * (a.dim() - 1))), a, b)
