"""``unroll``: a block applied a fixed number of times, and its gradient at three prices of memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint as recomputed

from . import compiled, transforms
from .gradients.graph import Graph, autocast_as, frontier
from .gradients.linear import GradientWarning
from .ops.layout import Layout, layout_of, widest
from .options import check_args, check_callable, check_flag, check_fraction, check_int
from .warning import warn

_sequence_nr = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]
DRIFT = 1e-3  # of a reconstructed start, relative, from which on its gradient is not trusted


def unroll(
    f: Callable[..., Any],
    z0: Any,
    steps: int,
    args: tuple[Any, ...] = (),
    *,
    checkpoint: bool = False,
    reversible: bool = False,
    damping: float = 1.0,
    pass_step: bool = False,
) -> Any:
    """Apply a block ``steps`` times: z <- z + damping (f(z, *args) - z).

    ::

        z = dq.unroll(block, z0, 8, (x,))  # every step in the graph
        z = dq.unroll(block, z0, 8, (x,), checkpoint=True)  # its states alone; each step is computed twice
        z = dq.unroll(block, z0, 8, (x,), reversible=True, damping=0.2)  # the last two states alone

    Nothing is solved for and nothing stops early: what a model of shared weights does that was trained with a fixed
    number of steps. ``fixed_point`` with ``backward=dq.Unroll()`` differentiates a solver, this the block.

    ``reversible=True`` is another iteration, of two sequences that both begin at z0, with b = damping::

        y <- (1 - b) y + b f(z, *args)
        z <- (1 - b) z + b f(y, *args)

    It evaluates f twice a step and returns z, which has the fixed points of f. The backward pass runs it from its end
    to its start and adds up the vjps at the states that it finds: the gradient of this iteration, exact up to rounding,
    with memory for one evaluation of f whatever ``steps`` is. It is differentiated once, by autograd.

    Going back a step divides by 1 - b, so rounding grows by (1 - b)^-steps at least, faster where f is steep. States
    are therefore carried in float64 between evaluations, where the device has it. Measured with tanh(z Q + x), Q 0.9
    times orthogonal: in float64, 20 steps with b = 0.3 agree with autograd within 1e-10; in float32, 100 steps with
    b = 0.1 give gradients within 5e-6 of float64's and find their start again within 1e-6, while 100 steps with b = 0.2
    miss it by some per cent. A start that is missed by more than 1e-3, relative, raises a ``GradientWarning``: take
    fewer steps or less damping.

    The random numbers of each evaluation (dropout) are drawn again from the state that the generators had. It is kept
    for those evaluations that drew any: 5 KB each on a CPU, 16 bytes more on CUDA.

    Args:
        f: (z, *args) -> same structure, shapes and dtypes as z. What it writes to (running statistics) is written again
            where it is evaluated again.
        z0: start: a tensor or a tree of tensors, of any shapes.
        steps: how often; 0 returns z0.
        args: further arguments of f: a tuple.
        checkpoint: keep the states between steps alone, and evaluate f again in the backward pass
            (``torch.utils.checkpoint``, which keeps the state of random numbers).
        reversible: the coupled iteration above. Gradients reach z0, args, and the parameters that f closes over.
        damping: in (0, 1]; with ``reversible`` below 1.
        pass_step: call ``f(z, *args, step=k)``, k from 0; both evaluations of a reversible step have its k.

    Returns:
        The state after the last step, like z0.

    Raises:
        TypeError, ValueError: an argument that cannot be, or an f that returns another structure, shape or dtype.
        RuntimeError: with ``reversible``, f closes over a tensor that was itself computed with gradients (pass it
            through args), or over a parameter with hooks on its gradient.
        NotImplementedError: with ``reversible``, inside torch.func or forward mode.

    Source of the reversible iteration: McCallum, Arora and Foster, Reversible Deep Equilibrium Models, 2025.
    """
    check_callable("f", f)
    check_int("steps", steps, least=0)
    check_args(args)
    check_flag("pass_step", pass_step)
    b = check_fraction("damping", damping)
    if check_flag("reversible", reversible):
        if check_flag("checkpoint", checkpoint):
            raise ValueError(
                "checkpoint=True does not go together with reversible=True, which keeps no states: choose one"
            )
        if b == 1:
            raise ValueError("reversible=True needs damping below 1: with damping=1 a step cannot be run backwards")
        return _reversible(f, z0, steps, args, b, pass_step)
    check_flag("checkpoint", checkpoint)
    layout = layout_of(z0, batch_dims=0)
    z = z0
    for k in range(steps):
        step = functools.partial(_step, layout, _numbered(f, k, pass_step), b)
        z = recomputed(step, z, *args, use_reentrant=False) if checkpoint else step(z, *args)
    return z


def _numbered(f: Callable[..., Any], k: int, pass_step: bool) -> Callable[..., Any]:
    return functools.partial(f, step=k) if pass_step else f


def _step(layout: Layout, f: Callable[..., Any], b: float, z: Any, *args: Any) -> Any:
    old, new = layout.tensors(z), layout.flatten(f(z, *args), "f(z)")
    new = [t.to(s.dtype) for t, s in zip(new, old, strict=True)]  # autocast made it narrower
    if b != 1:
        new = [s + b * (t - s) for t, s in zip(new, old, strict=True)]
    return layout.unflatten(new)


@compiled.entry("f")
def _reversible(f: Callable[..., Any], z0: Any, steps: int, args: tuple[Any, ...], b: float, pass_step: bool) -> Any:
    if transforms.active():
        raise NotImplementedError(
            "unroll(reversible=True) is differentiated by autograd alone, not inside of torch.func or forward mode"
        )
    layout = layout_of(z0, batch_dims=0)
    start = layout.tensors(z0)
    flat, spec = pytree.tree_flatten(args)
    autocast = (torch.is_autocast_enabled(layout.device.type), torch.get_autocast_dtype(layout.device.type))
    wanted = [i for i, t in enumerate(flat) if isinstance(t, Tensor) and t.requires_grad]
    run = _Run(compiled.eager(f), layout, b, steps, pass_step, flat, spec, wanted, autocast)
    differentiated = torch.is_grad_enabled()
    run.forward([t.detach() for t in start], differentiated)
    z = [t.to(s.dtype) for t, s in zip(run.z, start, strict=True)]
    inputs = [*start, *(flat[i] for i in wanted), *run.leaves]
    if differentiated and steps and any(t.requires_grad for t in inputs):
        return layout.unflatten(list(_Reversed.apply(run, z, len(start), *inputs)))
    return layout.unflatten(z) if steps else z0


@dataclass
class _Run:
    """One coupled iteration: what it is made of, and where it ended.

    Attributes:
        flat, spec: args, as leaves and structure.
        wanted: which of them need gradients.
        leaves: those that f closes over, found while it was evaluated.
        y, z: the two states, in the widest dtype.
        random: the generators' states before each evaluation that drew numbers, by its place.
    """

    f: Callable[..., Any]
    layout: Layout
    b: float
    steps: int
    pass_step: bool
    flat: list[Any]
    spec: Any
    wanted: list[int]
    autocast: tuple[bool, torch.dtype]
    leaves: list[Tensor] = field(default_factory=list)
    y: list[Tensor] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)
    random: dict[int, list[Tensor]] = field(default_factory=dict)

    def forward(self, start: list[Tensor], differentiated: bool) -> None:
        """Run it, each evaluation with a graph of its own if leaves are to be found; it is dropped at once."""
        self.y = self.z = [t.to(_wide(t)) for t in start]
        self.dtypes = [t.dtype for t in start]
        args = self.arguments([t.detach() if isinstance(t, Tensor) else t for t in self.flat], differentiated)
        for k in range(self.steps):
            self.y = self._mixed(self.y, self._first(2 * k, self.z, args, differentiated))
            self.z = self._mixed(self.z, self._first(2 * k + 1, self.y, args, differentiated))

    def arguments(self, flat: list[Any], differentiated: bool) -> list[Any]:
        """Args for f: tensors of their own, with gradients where they are wanted."""
        flat = list(flat)
        for i in self.wanted if differentiated else ():
            flat[i] = flat[i].detach().requires_grad_()
        return flat

    def evaluate(self, place: int, z: list[Tensor], args: list[Any]) -> list[Tensor]:
        """The leaves of f at z, in the mode that the forward pass had."""
        f = _numbered(self.f, place // 2, self.pass_step)
        device = self.layout.device.type
        with autocast_as(device, self.autocast) if self.autocast[0] else nullcontext():
            fz = f(self.layout.unflatten(z), *pytree.tree_unflatten(args, self.spec))
        return self.layout.flatten(fz, "f(z)")

    def narrow(self, x: list[Tensor], differentiated: bool) -> list[Tensor]:
        """Where f is evaluated: x in the state's dtype. F is given a copy, which it may write to."""
        return [t.detach().to(d).requires_grad_(differentiated) for t, d in zip(x, self.dtypes, strict=True)]

    def _first(self, place: int, x: list[Tensor], args: list[Any], differentiated: bool) -> list[Tensor]:
        before = _random_states(self.layout.device)
        z = self.narrow(x, differentiated)
        start = _sequence_nr()
        fz = self.evaluate(place, [t.clone() for t in z], args)
        if any(not torch.equal(s, t) for s, t in zip(before, _random_states(self.layout.device), strict=True)):
            self.random[place] = before
        if differentiated:
            self._find(fz, start, [*z, *(args[i] for i in self.wanted)])
        return [t.detach() for t in fz]

    def _find(self, fz: list[Tensor], start: int, known: list[Tensor]) -> None:
        leaves, elsewhere, _ = frontier(Graph(fz).edges, start, known)
        if elsewhere:
            raise RuntimeError(
                "unroll(reversible=True) needs every tensor that f uses and that was itself computed with gradients; f "
                "closes over one: pass it through args= instead"
            )
        new = [t for t in leaves if not any(t is found for found in self.leaves)]
        if any(t._backward_hooks for t in new):
            raise RuntimeError(
                "unroll(reversible=True) would run the hooks on a parameter that f closes over at every evaluation; "
                "remove them, or pass the parameter through args="
            )
        self.leaves += new

    def _mixed(self, x: list[Tensor], fx: list[Tensor]) -> list[Tensor]:
        return [(1 - self.b) * s + self.b * t for s, t in zip(x, fx, strict=True)]

    def before(self, x: list[Tensor], fx: list[Tensor]) -> list[Tensor]:
        """The inverse of a step's mixing."""
        return [(s - self.b * t.detach()) / (1 - self.b) for s, t in zip(x, fx, strict=True)]


class _Reversed(torch.autograd.Function):
    """The end of a run, and its gradient by way of its start."""

    @staticmethod
    def forward(ctx: Any, run: _Run, z: list[Tensor], count: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.run, ctx.count = run, count
        # Whatever is written to between the passes is noticed.
        others = [t for i, t in enumerate(run.flat) if isinstance(t, Tensor) and i not in run.wanted]
        ctx.save_for_backward(*run.y, *run.z, *others, *inputs)
        ctx.others = len(others)
        run.flat = [None if isinstance(t, Tensor) else t for t in run.flat]
        ctx.places = [i for i, t in enumerate(run.flat) if t is None]
        run.y, run.z = [], []
        return tuple(z)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor | None, ...]:
        saved, n, run = list(ctx.saved_tensors), ctx.count, ctx.run
        y, z, rest = saved[:n], saved[n : 2 * n], saved[2 * n :]
        others, inputs = iter(rest[: ctx.others]), rest[ctx.others :]
        wanted = iter(inputs[n:])
        flat = list(run.flat)
        for i in ctx.places:
            flat[i] = next(wanted if i in run.wanted else others)
        with torch.no_grad():
            found, of_start, of_rest = _Back(run, flat)(y, z, list(g))
            _check_start(found, inputs[:n], run)
            grads = [*(t.to(s.dtype) for t, s in zip(of_start, inputs, strict=False)), *of_rest]
        if torch.is_grad_enabled():  # create_graph=True
            grads = [t if t is None else _Once.apply(t, *inputs, *g) for t in grads]
        return (None, None, None, *grads)


class _Once(torch.autograd.Function):
    """The identity on its first input; an error for whoever differentiates it."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, *depends_on: Tensor) -> Tensor:
        return t.clone()

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:
        raise NotImplementedError(
            "unroll(reversible=True) is differentiated once: leave out reversible=True for a second derivative"
        )


class _Back:
    """A run from its end to its start."""

    def __init__(self, run: _Run, flat: list[Any]) -> None:
        self.run = run
        self.args = run.arguments(flat, True)
        self.inputs = [*(self.args[i] for i in run.wanted), *run.leaves]
        self.totals: list[Tensor | None] = [None] * len(self.inputs)

    def __call__(
        self, y: list[Tensor], z: list[Tensor], g: list[Tensor]
    ) -> tuple[tuple[list[Tensor], list[Tensor]], list[Tensor], list[Tensor | None]]:
        """The start that is found again, twice; the gradients with respect to z0, and to ``inputs``."""
        run, b = self.run, self.run.b
        gz = [t.to(_wide(t)) for t in g]
        gy = [torch.zeros_like(t) for t in gz]
        with _random_kept(run.layout.device), torch.enable_grad():
            for k in reversed(range(run.steps)):
                f_of_y, v = self._vjp(2 * k + 1, y, gz)
                z, gy, gz = run.before(z, f_of_y), _plus(gy, v), [(1 - b) * t for t in gz]
                f_of_z, v = self._vjp(2 * k, z, gy)
                y, gz, gy = run.before(y, f_of_z), _plus(gz, v), [(1 - b) * t for t in gy]
        return (y, z), _plus(gy, gz), self.totals

    def _vjp(self, place: int, x: list[Tensor], g: list[Tensor]) -> tuple[list[Tensor], Sequence[Tensor | None]]:
        """F at x, and b J^T g; what it is to the other inputs is added to the totals."""
        run = self.run
        states = run.random.get(place)
        if states is not None:
            _set_random_states(run.layout.device, states)
        z = run.narrow(x, True)
        fz = run.evaluate(place, [t.clone() for t in z], self.args)
        which = [i for i, t in enumerate(fz) if t.requires_grad]
        if not which:
            return fz, [None] * len(z)
        found = torch.autograd.grad(
            [fz[i] for i in which],
            [*z, *self.inputs],
            [(run.b * g[i]).to(fz[i].dtype) for i in which],
            allow_unused=True,
        )
        for i, new in enumerate(found[len(z) :]):
            old = self.totals[i]
            self.totals[i] = old if new is None else new if old is None else old + new
        return fz, found[: len(z)]


def _plus(g: Sequence[Tensor], v: Sequence[Tensor | None]) -> list[Tensor]:
    return [s if t is None else s + t for s, t in zip(g, v, strict=True)]


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, widest(t.device))


def _check_start(found: tuple[list[Tensor], list[Tensor]], start: list[Tensor], run: _Run) -> None:
    if start[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return
    drift = relative_drift([*found[0], *found[1]], [*start, *start])
    if not drift <= DRIFT:
        warn(
            f"unroll(reversible=True) missed its start by {drift:.1g}, relative, on its way back through {run.steps} "
            f"steps with damping={run.b:g}: its gradient may be inaccurate; take fewer steps or less damping, or "
            "checkpoint=True",
            GradientWarning,
        )


def relative_drift(found: list[Tensor], start: list[Tensor]) -> float:
    """How far tensors lie from where they began: the largest distance, by the largest size or 1 if that is more."""
    if not any(t.numel() for t in start):
        return 0.0
    far = [(s - t).abs().max() for s, t in zip(found, start, strict=True) if t.numel()]  # in one dtype, the widest
    size = [t.abs().max().float() for t in start if t.numel()]
    return float(torch.stack(far).max()) / max(1.0, float(torch.stack(size).max()))


def _random_states(device: torch.device) -> list[Tensor]:
    """Of the generators that f may draw from."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(*_which(device)))
    return states


def _set_random_states(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], *_which(device))


def _which(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # there is one, and torch.mps takes none


@contextmanager
def _random_kept(device: torch.device) -> Iterator[None]:
    states = _random_states(device)
    try:
        yield
    finally:
        _set_random_states(device, states)
