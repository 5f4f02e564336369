"""The joint solve: find the fixed point of a network and optimise its input at once.

    min_x  sum_b loss(z, x)_b   subject to   z = f(z, x)

is stationary where z = f(z, x), mu = l_z + f_z^T mu (the adjoint) and x = P(x - a_x (l_x + f_x^T mu)). The joint map
steps all three from the same iterate (Jacobi) and Anderson's method accelerates the whole. A step costs one evaluation
of f and loss with one backward pass; nested loops pay a forward solve, a backward solve and a gradient step for each
step of x.

Source: Gurumurthy, Bai, Manchester and Kolter, Joint Inference and Input Optimization in Equilibrium Networks, NeurIPS
2021.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import compiled, ranges, transforms
from ..gradients.implicit import Implicit
from ..log import LOG, telling
from ..loop.progress import progress_bar
from ..ops.shared import tell
from ..solution import ConvergenceError
from ..solvers.base import Solver
from ..status import Status
from .agree import share
from .gradient import Envelope, attach_envelope, attach_implicit
from .options import JointOptions, choose_joint_solver
from .problem import Problem, ordinary
from .solution import JointSolution
from .state import JointState


@compiled.entry("f", "loss")
def joint_solve(
    f: Callable[..., Any],
    loss: Callable[..., Any],
    z0: Any,
    x0: Any,
    args: tuple[Any, ...] = (),
    *,
    step_size: Any = None,
    damping: Any = (0.8, 0.6),
    project: Any = None,
    normalize: bool = False,
    accelerate: Any = None,
    solver: str | Solver | None = None,
    rtol: Any = None,
    atol: Any = 0.0,
    max_iter: int = 100,
    returns: str = "best",
    safeguard: bool = False,
    stop: str = "each",
    group: Any = None,
    batch_dims: int = 1,
    segments: Any = None,
    mu0: Any = None,
    backward: str | Envelope | Implicit = "envelope",
    trace: bool = False,
    callback: Callable[[int, JointState], bool | None] | None = None,
    throw: bool = False,
    backend: str = "auto",
    progress: bool = False,
) -> JointSolution:
    """Minimise loss(z, x) over x, sample by sample, subject to z = f(z, x).

    Args:
        f: callable (z, x, *args) -> like z, differentiable in z and x, which it does not write to.
        loss: callable (z, x, *args) -> (B,), a cost for each sample; sums over a sample, never means over the batch, or
            ``step_size`` would depend on the batch.
        z0: start of the state, as in ``fixed_point``.
        x0: start of the input, tensors that share z0's dim 0, dtype and device; within ``project``. An empty tuple:
            solve for z and mu alone, forward and adjoint at once.
        args: handed to f and loss after x.
        step_size: a_x of the gradient step: a positive number, a function k -> number of the step (from 0), or tensors
            that broadcast to x0. About 1/L, L the curvature of the cost in x. Needed unless x0 is empty.
        damping: of z and mu in (0, 1], default (0.8, 0.6).
        project: ``Box``, ``L2Ball`` or ``LinfBall`` of ``deqfast.project``, or a function x -> x that treats samples
            independently.
        normalize: step along the gradient divided by its norm, sample by sample; for attacks.
        accelerate: the blocks that Anderson's method moves, default all of ("z", "mu", "x"). With ``normalize`` or an
            active projection leave x out: its residual is no measure of progress there.
        solver: ``Anderson`` (default, with m=20) or ``Picard`` for plain damped steps.
        rtol: relative tolerance, a number, one for each of z, mu, x, or a dict of them; a sample stops when every block
            is within its own. Default that of the dtype. For x it is the length of its step relative to x.
        atol: absolute part of the same, default 0.
        max_iter: evaluations at most, default 100.
        returns: "best" (default), the iterate whose largest residual, relative to the tolerances, is least; "last"; or
            "cost", the one accepted last, where a lower cost is accepted at up to 1.3 times the best residual.
        safeguard: forget a sample's history when its residual grows beyond twice the best since it last did; for maps
            that walk to saddles.
        stop: "each" (default): a sample whose blocks are within tolerance is frozen. "all": nothing is frozen before
            the evaluation at which every finite sample is; for batches that f or loss couples. Waits for a device at
            every evaluation. "consensus": the same over the ranks of ``group``, each with samples of its own, for an f
            or a loss that holds collectives; waits for the sum of one number at every evaluation.
        group: ranks that share the solve, as in ``fixed_point``: every sample is spread over them, z0, x0 and mu0 hold
            this rank's numbers of it, and the cost of a sample is the sum over ranks of what loss returns on each. f
            and loss may communicate, by collectives that autograd differentiates; so may a projection of your own. On
            CPU tensors. With ``stop="consensus"`` the ranks that stop together, default all.
        batch_dims: how many leading dims of z0 and x0 count samples, as in ``fixed_point``; loss returns their shape.
        segments: samples of unequal length as rows of z0 and of x0 alike, as in ``fixed_point``; loss returns
            (samples,). They are padded to the longest, for z, mu and x are one system a sample. A projection of your
            own sees the rows of all samples; those of ``deqfast.project`` know samples.
        mu0: start of the adjoint, default zeros.
        backward: "envelope" (default) or an ``Envelope``: gradients reach z, and through it parameters and args, with x
            as a constant, which is right where the outer loss is the inner one; the backward solve starts at mu.
            "implicit" or an ``Implicit``: z, x and mu as functions of parameters and args, through the joint map
            (second derivatives of f and loss); its tolerance is by default the least of ``rtol``, and its u0 is shaped
            like the list of the tensors of z, mu and x. "none". In inference mode there is no gradient.
        trace: record residuals of every block, (nfe, B) each.
        callback: called as callback(k, state) after every evaluation; True stops.
        throw: raise ``ConvergenceError`` unless every sample converged.
        backend: as in ``fixed_point``.
        progress: show a tqdm bar.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; what f and loss return is checked
            at the first evaluation.
        RankError: ranks were given what does not fit together, or one of them what cannot be; on every rank.
        ConvergenceError: with ``throw=True``.
        NotImplementedError: within torch.func transforms or forward mode.
        RuntimeError: of torch, in inference mode, where f or loss closes over tensors that were made in that mode.
    """
    if transforms.active():
        raise NotImplementedError(
            "joint_solve within torch.func transforms or forward mode: it differentiates f and loss by itself. Samples "
            "of a batch are solved independently, and backward='implicit' gives gradients to plain autograd"
        )
    try:
        gradient = _gradient(backward)
        options = JointOptions(
            solver=choose_joint_solver(solver),
            rtol=rtol,
            atol=atol,
            max_iter=max_iter,
            backward=gradient,
            returns=returns,
            stop=stop,
            group=group,
            batch_dims=batch_dims,
            segments=segments,
            trace=trace,
            callback=callback,
            throw=throw,
            backend=backend,
            progress=progress,
            damping=damping,
            normalize=normalize,
            accelerate=accelerate,
            safeguard=safeguard,
        )
    except (TypeError, ValueError) as error:
        tell(group, stop, error)
        raise
    with contextlib.ExitStack() as modes:
        if torch.is_inference_mode_enabled():  # derivatives of f and loss need a graph, which it forbids
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.no_grad())
            z0, x0, mu0, args, step_size = ordinary((z0, x0, mu0, args, step_size))
        try:
            problem = Problem(f, loss, z0, x0, mu0, args, step_size=step_size, project=project, options=options)
        except (TypeError, ValueError) as error:
            tell(group, stop, error)
            raise
        share(problem)
        problem.check_start()
        state = JointState(problem)
        with ranges.within(ranges.JOINT):
            rows = _loop(state, options)
        solution = _conclude(state, rows)
        if telling():
            layout = problem.layout
            LOG.debug("joint, %d samples of %d numbers: %s", layout.B, layout.N, solution.summary())
        if gradient is not None and torch.is_grad_enabled():
            if isinstance(gradient, Envelope):
                solution.z = attach_envelope(problem, solution, gradient)
            else:
                solution.z, solution.mu, solution.x = attach_implicit(problem, solution, gradient)
        if options.throw and not bool(solution.converged.all()):
            raise ConvergenceError(solution)
        return solution


def _gradient(backward: Any) -> Envelope | Implicit | None:
    if isinstance(backward, (Envelope, Implicit)):
        return backward
    if isinstance(backward, str) and backward in ("envelope", "implicit", "none"):
        return None if backward == "none" else Envelope() if backward == "envelope" else Implicit()
    raise ValueError(f"backward must be 'envelope', 'implicit', 'none', an Envelope or an Implicit, got {backward!r}")


def _loop(state: JointState, options: JointOptions) -> list[dict[str, Tensor]] | None:
    rows: list[dict[str, Tensor]] | None = [] if options.trace else None
    bar = progress_bar(options.max_iter) if options.progress else None
    try:
        with torch.no_grad():
            while not state.done:
                state.advance()
                if rows is not None:
                    newest = state.steps == state.nfe
                    rows.append({name: torch.where(newest, r, math.nan) for name, r in state.residual.items()})
                if bar is not None:
                    bar.update()
                    bar.set_postfix_str(f"{state.known_running} running", refresh=False)
                if options.callback is not None and options.callback(state.nfe, state):
                    state.judge()
                    break
    finally:
        if bar is not None:
            bar.close()
    return rows


def _conclude(state: JointState, rows: list[dict[str, Tensor]] | None) -> JointSolution:
    problem = state.problem
    problem.check_late()  # unless the solve was long enough to have heard
    leaves = state.answer()
    status = state.status.clone()
    if not problem.layout.total:
        status.fill_(Status.CONVERGED)
    elif not state.done:
        status.masked_fill_(status == Status.RUNNING, Status.STOPPED)
    many = len(problem.z_layout.leaves)
    trace = None
    if rows is not None:
        empty = {name: r.new_empty(0, *r.shape) for name, r in state.residual.items()}
        trace = {name: torch.stack([row[name] for row in rows]) if rows else t for name, t in empty.items()}
    return JointSolution(
        z=problem.z_layout.unflatten(leaves[:many]),
        mu=problem.z_layout.unflatten(leaves[many : 2 * many]),
        x=problem.x_tree(problem.feasible(leaves[2 * many :])),
        cost=state.best_cost,
        residual=state.best_residual,
        converged=status == Status.CONVERGED,
        steps=state.steps.clone(),
        status=status,
        nfe=state.nfe,
        trace=trace,
        backend=state.backend,
    )
