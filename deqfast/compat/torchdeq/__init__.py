"""torchdeq's solvers on deqfast's kernels, and its modules without torchdeq.

::

    from deqfast.compat import torchdeq

    torchdeq.install()  # before get_deq: both passes of torchdeq's modules run on deqfast
    deq = torchdeq.get_deq(f_solver="anderson", ift=True)  # or the same module, with no torchdeq needed

The solvers are there as functions too. They count, stop and return as torchdeq's do: nobody stops before the worst
sample, "abs" is ||f(z) - z|| and "rel" that over ||f(z)||, Anderson and plain iteration return f of every sample's best
iterate, Broyden the iterate, and a ``SolverStat`` has the lowest residuals and both traces. Different on purpose:

- steps are deqfast's, so that Anderson's ``lam`` is relative to the diagonal and has no units (``faithful=True`` keeps
  torchdeq's own recurrences);
- a sample that is not finite keeps its best iterate and holds up nobody;
- every index of ``indexing`` has its state, those after the stop the last one, so that every gradient finds its state;
- with a damping ``tau`` the residual is still that of f;
- a start within tolerance costs one evaluation, and the first evaluations count for the best as all others do;
- implicit gradients are ``dq.Implicit``'s: ``b_tol`` is relative to every sample's own gradient (1e-6 of a mean loss is
  in torchdeq more like 1e-3: ask for that where it was enough), they are twice differentiable or refused, fit for
  autocast, without a hook, and what does not converge says so (``GradientWarning``);
- a tensor without dims stays one, half precision is solved, and a keyword that no solver has is a ``TypeError``.

On a CPU the bookkeeping costs a few microseconds an evaluation; on other devices a masked copy, and the loop never
waits. torch.func's grad, vjp and jvp pass through ``get_deq``'s modules as through ``dq.fixed_point``.

Source: torchdeq 0.1.0, https://github.com/locuslab/torchdeq.
"""

from __future__ import annotations

from ._deq import DEQ, get_deq
from ._install import InstallWarning, install, installed, uninstall
from ._solvers import anderson_solver, broyden_solver, fixed_point_iter, simple_fixed_point_iter
from ._stat import SolverStat

__all__ = [
    "DEQ",
    "InstallWarning",
    "SolverStat",
    "anderson_solver",
    "broyden_solver",
    "fixed_point_iter",
    "get_deq",
    "install",
    "installed",
    "simple_fixed_point_iter",
    "uninstall",
]
