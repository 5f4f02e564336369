"""torchdeq's modules, by its arguments and results, without torchdeq."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...jacobian import spectral_radius
from ...options import check_callable
from ._arguments import check_max_iter
from ._config import Config, config_of, solver_of
from ._gradients import ImplicitGrad, PhantomGrad, Writer
from ._stat import SolverStat


class Mapped:
    """What the solvers call ``func`` by: z in, z out, in the container that z came in.

    Args:
        func: called with z, or with the entries of a list.
        listed: whether z is a list.
    """

    def __init__(self, func: Callable[..., Any], listed: bool) -> None:
        check_callable("func", func)
        self.func, self.listed = func, listed

    def __call__(self, z: Any, tau: float = 1.0) -> Any:
        """The damped image z + tau (func(z) - z)."""
        if not self.listed:
            found = self.func(z)
            return found if tau == 1 else tau * found + (1 - tau) * z
        found = self.func(*z)
        found = [found] if isinstance(found, Tensor) else list(found)
        return found if tau == 1 else [tau * new + (1 - tau) * old for new, old in zip(found, z, strict=True)]


class DEQ(nn.Module):
    """A fixed-point layer, called as torchdeq's; see ``get_deq``.

    Args:
        config: its arguments.

    Attributes:
        config: the same.
        f_solver, b_solver: the functions that solve.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.f_solver = solver_of("f_solver", config.f_solver)
        self.b_solver = solver_of("b_solver", config.b_solver)
        steps = config.phantom_steps
        self.produce_grad: list[Callable[..., list[Any]]] = [
            PhantomGrad(k, config.tau, config.sup_gap, config.sup_loc)
            for k in (steps * config.states if len(steps) == 1 else steps)
        ]
        if config.ift or config.hook_ift:
            self.produce_grad[-1] = ImplicitGrad(self.b_solver, config.b_max_iter, config.b_tol, config.b_stop_mode)

    def forward(
        self,
        func: Callable[..., Any],
        z_init: Any,
        solver_kwargs: Mapping[str, Any] | None = None,
        sradius_mode: bool = False,
        backward_writer: Writer | None = None,
    ) -> tuple[list[Any], SolverStat]:
        """Solve z = func(z).

        Args:
            func: callable z -> shaped like z; of a list its entries, func(*z), and any container of as many comes back.
            z_init: (B, ...) or a list or tuple of such tensors: where the solve starts.
            solver_kwargs: options of the forward solver; ``f_max_iter``, ``f_tol`` and ``f_stop_mode`` in place of
                those of the module.
            sradius_mode: in eval mode, put the spectral radius of the Jacobian into ``info``.
            backward_writer: called with a ``SolverStat`` after every backward solve of an implicit gradient.

        Returns:
            A list of z, each with its gradient: in training one a state, in eval mode the solution. And a
            ``SolverStat``.
        """
        listed = not isinstance(z_init, Tensor)
        if listed and not isinstance(z_init, (list, tuple)):
            raise TypeError(f"z_init must be a tensor, or a list or tuple of tensors, got {type(z_init).__name__}")
        mapped = Mapped(func, listed)
        options = dict(solver_kwargs or {})
        limit = options.pop("f_max_iter", None)
        if limit is None:
            limit = self.config.f_max_iter if self.training else self.config.evaluations
        limit = check_max_iter(limit, "f_max_iter")
        start = list(z_init) if listed else z_init
        if not self.training:
            return self._evaluate(mapped, start, limit, options, sradius_mode, backward_writer)
        way = self._sliced if self.config.core == "sliced" else self._indexed
        return way(mapped, start, limit, options, backward_writer)

    def _solve(
        self, func: Mapped, z: Any, limit: int, options: dict[str, Any], indexing: list[float] | None = None
    ) -> tuple[Any, list[Any], SolverStat]:
        config = self.config
        given = {"tol": options.pop("f_tol", config.f_tol), "stop_mode": options.pop("f_stop_mode", config.f_stop_mode)}
        with torch.no_grad():
            found: tuple[Any, list[Any], SolverStat] = self.f_solver(
                func, x0=z, max_iter=limit, indexing=indexing, **given, **options
            )
        return found

    def _evaluate(
        self,
        func: Mapped,
        z: Any,
        limit: int,
        options: dict[str, Any],
        sradius_mode: bool,
        writer: Writer | None,
    ) -> tuple[list[Any], SolverStat]:
        z, _, info = self._solve(func, z, limit, options)
        device = pytree.tree_leaves(z)[0].device
        info["sradius"] = spectral_radius(func, z) if sradius_mode else torch.zeros(1, device=device)
        if torch.is_grad_enabled():
            z = self.produce_grad[-1](self, func, z, writer=writer)[-1]
        return [z], info

    def _sliced(
        self, func: Mapped, z: Any, limit: int, options: dict[str, Any], writer: Writer | None
    ) -> tuple[list[Any], SolverStat]:
        out: list[Any] = []
        info = SolverStat()
        for evaluations, produce in zip(self._slices(limit), self.produce_grad, strict=True):
            z, _, info = self._solve(func, z, evaluations, dict(options))
            out += produce(self, func, z, writer=writer)
            z = out[-1]
        return out, info

    def _indexed(
        self, func: Mapped, z: Any, limit: int, options: dict[str, Any], writer: Writer | None
    ) -> tuple[list[Any], SolverStat]:
        _, states, info = self._solve(func, z, limit, options, self._indices(limit))
        pairs = zip(states, self.produce_grad, strict=True)
        return [out for state, produce in pairs for out in produce(self, func, state, writer=writer)], info

    def _slices(self, limit: int) -> list[int]:
        """Evaluations from one state to the next."""
        states = self.config.n_states
        if states > 1:
            return [limit // states] * states
        ends = [0, *(int(min(index, limit)) for index in sorted(self.config.indices)), limit]
        return [b - a for a, b in itertools.pairwise(ends)]

    def _indices(self, limit: int) -> list[float]:
        """Evaluations after which a state is taken."""
        states = self.config.n_states
        if states > 1:
            step = max(1, limit // states)
            return [max(1, limit - (states - 1 - k) * step) for k in range(states)]
        return [*self.config.indices, max(1, limit)]


def get_deq(args: Any = None, **kwargs: Any) -> DEQ:
    """A module with the arguments of ``torchdeq.get_deq``, called as its modules are; torchdeq is not needed.

    Args:
        args: a mapping, a Namespace or any object with attributes that holds some of these, and whatever else.
        **kwargs: the same by name, before those of ``args``:

            - ``core``: "sliced" (default): states in between begin the next slice of the solve; "indexing": they are
              taken out of one solve.
            - ``f_solver``, ``b_solver``: "fixed_point_iter" (default), "anderson", "broyden",
              "simple_fixed_point_iter", or a function (of the backward, one of this package).
            - ``f_max_iter``, ``b_max_iter``: evaluations at most, 40; 0 or a float too.
            - ``f_tol`` (1e-3) and ``f_stop_mode`` ("abs" or "rel"): when a solve stops, as of ``anderson_solver``.
            - ``b_tol`` (1e-6): relative tolerance of every sample's backward solve, whatever ``b_stop_mode``.
            - ``eval_factor`` (1.0), ``eval_f_max_iter`` (0): the limit in eval mode, a multiple of ``f_max_iter`` or,
              if positive, that number.
            - ``ift``, ``hook_ift``: the last state has the implicit gradient.
            - ``grad``: phantom steps, one number or one for each state; ``tau`` damps them. ``sup_gap``, ``sup_loc``:
              which of them are returned too.
            - ``n_states``, ``indexing``: states in training, so many at equal distances, or at these evaluations.
            - ``no_stat``: taken; statistics cost next to nothing.

    Returns:
        A module. In eval mode with gradients enabled its result has one too, by the last of its ways, and is f(z) for
        it; torchdeq's is z, without one.

    Raises:
        TypeError: a keyword that ``get_deq`` does not have.
        ValueError: a value that an argument cannot have.
    """
    return DEQ(config_of(args, kwargs))
