"""A joint problem: functions and options, checked, and what f, loss and their gradients give at an iterate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..gradients.implicit import Implicit
from ..ops.codes import BLOCKS
from ..ops.joint import MapOptions
from ..ops.lag import Later, capturing
from ..ops.layout import Layout, Leaf, layout_of
from ..ops.samples import FIRST_DIM
from ..ops.shared import Group
from ..options import check_args, check_callable
from ..project import Box, L2Ball, LinfBall, Projection
from ..sharded import is_sharded
from .options import JointOptions, check_positive


class Problem:
    """One call of ``joint_solve``: its functions and options, checked."""

    def __init__(
        self,
        f: Callable[..., Any],
        loss: Callable[..., Any],
        z0: Any,
        x0: Any,
        mu0: Any,
        args: tuple[Any, ...],
        *,
        step_size: Any,
        project: Any,
        options: JointOptions,
    ) -> None:
        check_callable("f", f)
        check_callable("loss", loss)
        check_args(args, example="a")
        for name, tree in (("z0", z0), ("x0", x0)):
            if is_sharded(tree):
                raise TypeError(
                    f"{name} must hold plain tensors, got some of a mesh: give to_local() of them, and group="
                )
        self.f, self.loss, self.args, self.options = f, loss, args, options
        self.z_layout = layout_of(z0, options.batch_dims, options.segments, name="z0")
        self.has_x = bool(pytree.tree_leaves(x0))
        self.x_layout: Any = None  # of an absent x
        self.x_leaves: list[Leaf] = []
        self.x_tree: Callable[[list[Tensor]], Any] = lambda leaves: x0
        if self.has_x:
            self.x_layout = self._layout_of_x(x0)
            self.x_leaves, self.x_tree = self.x_layout.leaves, self.x_layout.unflatten
            check_alike(self.z_layout, self.x_layout)
        self.blocks = BLOCKS if self.has_x else BLOCKS[:2]
        z_leaves = [t.detach() for t in self.z_layout.tensors(z0)]
        mu_leaves = [torch.zeros_like(t) for t in z_leaves] if mu0 is None else self.z_layout.flatten(mu0, "mu0")
        x_leaves = [t.detach() for t in self.x_layout.tensors(x0)] if self.has_x else []
        self.start = [*z_leaves, *(t.detach() for t in mu_leaves), *x_leaves]
        self.layout = Layout(self.start, "z0 and x0")
        self.accelerate = options.accelerated(self.blocks)
        self.rules = options.rules(self.blocks, self.layout.dtype)
        self._rates: list[Tensor] | None = None
        self.largest_step = 0.0  # of those made
        self._late: list[tuple[Later, str]] = []
        self.given_step = step_size
        self._schedule = self._step_sizes(step_size)
        self.projection = p = self._projection(project)
        spread = options.group is not None and options.stop != "consensus"
        if spread and isinstance(options.backward, Implicit) and getattr(p, "ball", None) == "l2":
            why = "whose norms autograd does not add up over ranks"
            raise ValueError(f"group does not go together with backward='implicit' and an L2Ball, {why}")
        self.group: Group | None = None  # the ranks that share the solve, once they have agreed
        self.leaf_numbers: list[int] = []  # of each tensor on all ranks, where samples are spread over them

    def numbers_of(self, which: list[int]) -> int:
        """Numbers a sample of some tensors on all ranks, where samples are spread over them; else 0."""
        return sum(self.leaf_numbers[i] for i in which) if self.leaf_numbers else 0

    def _layout_of_x(self, x0: Any) -> Layout:
        if self.options.segments is not None:
            return Layout(x0, "x0", self.z_layout.samples)  # the same rows
        return layout_of(x0, self.options.batch_dims, name="x0")

    def _step_sizes(self, step_size: Any) -> Callable[[int], float]:
        if not self.has_x:
            if self.options.normalize:
                raise ValueError("normalize needs an x0 to step")
            if step_size is not None:
                raise ValueError("step_size needs an x0 to step; leave it out to solve for z and mu alone")
            return lambda k: 1.0
        if callable(step_size):
            return lambda k: check_positive("step_size(k)", step_size(k))
        if isinstance(step_size, bool) or not isinstance(step_size, (int, float)):
            if self.options.normalize:
                raise ValueError("step_size must be a number or a function of the step with normalize=True")
            self._rates = self._tensor_steps(step_size)
            return lambda k: 1.0
        rate = check_positive("step_size", step_size)
        return lambda k: rate

    def _tensor_steps(self, step_size: Any) -> list[Tensor]:
        leaves = pytree.tree_leaves(step_size)
        if not leaves or not all(isinstance(t, Tensor) for t in leaves):
            got = type(step_size).__name__
            raise TypeError(f"step_size must be a number, a function of the step or tensors like x0, got {got}")
        if len(leaves) != len(self.x_leaves):
            raise ValueError(f"step_size: expected {len(self.x_leaves)} tensors as in x0, got {len(leaves)}")
        for t, shape in zip(leaves, self.x_layout.shapes, strict=True):
            if t.is_complex() or t.dtype == torch.bool:
                raise TypeError(f"step_size must hold real numbers, got {t.dtype}")
            if t.device != self.layout.device:
                where = f"expected {self.layout.device}, got {t.device}"
                raise ValueError(f"step_size must be on the device of x0, {where}")
            if not _broadcasts(t, shape):
                raise ValueError(f"step_size must broadcast to x0, expected {tuple(shape)}, got {tuple(t.shape)}")
        rates = [t.detach().to(self.layout.dtype) for t in leaves]
        for t in rates:
            within = f"step_size must be positive and finite throughout, as {self.layout.dtype} too"
            self._refuse_where(~((t > 0) & t.isfinite()).all(), within)
        samples = self.x_layout.samples
        if samples is FIRST_DIM:
            return rates
        return [samples.split(t.expand(s)) for t, s in zip(rates, self.x_layout.shapes, strict=True)]

    def step_size(self, k: int) -> float:
        """a_x of step ``k``."""
        rate = self._schedule(k)
        self.largest_step = max(self.largest_step, rate)
        return rate

    def _projection(self, project: Any) -> Projection | Callable[[Any], Any] | None:
        if project is None:
            return None
        if not self.has_x:
            raise ValueError("project needs an x0 to project")
        if not callable(project) or isinstance(project, type) or project in (Box, L2Ball, LinfBall):
            got = getattr(project, "__name__", type(project).__name__)
            raise TypeError(f"project must be a set such as Box(0, 1), or a function of x, got {got}")
        if isinstance(project, Projection) and project.center is not None:
            self.x_layout.flatten(project.center, "project.center")
        return project

    def check_start(self) -> None:
        """Raise ValueError unless x0 lies within the projection; on every rank that shares the solve."""
        if self.projection is None:
            return
        try:
            self._check_inside(self.projection)
        except (TypeError, ValueError) as error:
            if self.group is not None:
                self.group.ranks.give_up(error)
            raise
        if self.group is not None:
            self.group.ranks.agree({"x0": "within project"}, (0, 0))

    def _check_inside(self, project: Projection | Callable[[Any], Any]) -> None:
        x = self.start[2 * len(self.z_layout.leaves) :]
        if not self.layout.B:
            return
        inside = self._projected(project, [t.clone() for t in x])
        for t, p in zip(x, inside, strict=True):
            eps = torch.finfo(t.dtype).eps
            # Of rounding, in what made x0 as well. A number that is none says nothing of the others.
            bound = (1e3 if eps < 1e-4 else 4.0) * eps * (1 + t.abs().nan_to_num(0.0))
            away = ((t - p).abs() > bound).any()
            self._refuse_where(away, "x0 must lie within the projection; start from project(x0)")

    def _projected(self, project: Projection | Callable[[Any], Any], x: list[Tensor]) -> list[Tensor]:
        """The tensors of x, (B, ...) each, projected: a set of ours knows samples by their first dim."""
        if not isinstance(project, Projection):
            return self.x_layout.flatten(project(self.x_tree(x)), "project(x)")
        center = project.center
        if center is not None:
            center = self.x_layout.flatten(center, "project.center")
        add = self.group.ranks.add if self.group is not None and self.group.spread else None
        found = replace(project, center=center).inside(x, add)
        if not self._leaves_zero(project):
            found = self.x_layout.tensors(self.x_layout.unflatten(found))  # padding is 0 again
        inside: list[Tensor] = found
        return inside

    def _leaves_zero(self, project: Projection) -> bool:
        """Whether it leaves the padding of unequal samples alone; there need not be any."""
        return self.x_layout.samples.views or project.low <= 0 <= project.high

    def _refuse_where(self, bad: Tensor, message: str) -> None:
        """Raise ValueError if ``bad``; on a GPU in ``check_late``, for nobody is to wait for it."""
        if bad.device.type == "cpu":
            if bool(bad):
                raise ValueError(message)
        elif not capturing(bad.device):
            self._late.append((Later(bad), message))

    def check_late(self) -> None:
        """Raise ValueError for what was found on the device since."""
        while self._late:
            bad, message = self._late.pop(0)
            if bad:
                raise ValueError(message)

    @property
    def map_options(self) -> MapOptions:
        """What the op needs to know."""
        options = MapOptions(damping=self.options.damping, normalize=self.options.normalize)
        p = self.projection
        if isinstance(p, Projection) and self._leaves_zero(p):
            options.ball, options.radius, options.low, options.high = p.ball, p.radius, p.low, p.high
        return options

    def centers(self) -> list[Tensor | None]:
        """(B, n) centre of the projection for each tensor of x, None for the others and where there is none."""
        none: list[Tensor | None] = [None] * (2 * len(self.z_layout.leaves))
        center = getattr(self.projection, "center", None) if isinstance(self.projection, Projection) else None
        if center is None:
            return none + [None] * len(self.x_leaves)
        leaves = self.x_layout.flatten(center, "project.center")
        return none + [
            leaf.rows(t.detach()).to(self.layout.acc).contiguous()
            for leaf, t in zip(self.x_leaves, leaves, strict=True)
        ]

    @property
    def project_leaves(self) -> Callable[[list[Tensor]], list[Tensor]] | None:
        """The caller's own projection on the tensors of x, None if the op does it."""
        project = self.projection
        if project is None or (isinstance(project, Projection) and self._leaves_zero(project)):
            return None
        return lambda leaves: self._projected(project, leaves)

    def feasible(self, x: list[Tensor]) -> list[Tensor]:
        """The tensors of x, projected."""
        if self.projection is None:
            return x
        return self._projected(self.projection, x)

    def evaluate(self, at: list[Tensor], first: bool) -> tuple[list[Tensor], Tensor]:
        """f, p and q (see ``gradients``) as one list, and the (B,) cost, at the tensors of z, mu and x."""
        many = len(self.z_layout.leaves)
        with torch.enable_grad():
            z_in = [t.detach().requires_grad_() for t in at[:many]]
            x_in = [t.detach().requires_grad_() for t in at[2 * many :]]
            z_tree, x_tree = self.z_layout.unflatten(z_in), self.x_tree(x_in)
            made = self.f(z_tree, x_tree, *self.args)
            cost = self.loss(z_tree, x_tree, *self.args)
            check = self._check_first if first else self._flat
            fz = check(made, cost, z_in, x_in)
            found = gradients(fz, at[many : 2 * many], cost, [*z_in, *x_in])
        values = [*(t.detach() for t in fz), *found]
        if self._rates is not None:
            first_x = len(values) - len(self._rates)
            values[first_x:] = [q * rate for q, rate in zip(values[first_x:], self._rates, strict=True)]
        return values, cost.detach().to(self.layout.acc).reshape(self.layout.B)

    def _flat(self, made: Any, cost: Any, z: list[Tensor], x: list[Tensor]) -> list[Tensor]:
        return self.z_layout.flatten(made, "f(z, x)")

    def _check_first(self, made: Any, cost: Any, z: list[Tensor], x: list[Tensor]) -> list[Tensor]:
        group = self.group
        try:
            fz = self.z_layout.flatten(made, "f(z, x)")
            check_cost(cost, self.z_layout.batch_shape)
        except (TypeError, ValueError) as error:
            if group is not None:
                group.ranks.give_up(error)
            raise
        depends = _depends([cost], [*z, *x]), not x or _depends(fz, x)
        if group is not None:  # a rank may have no part in the cost of a sample, or none of x
            every = group.ranks.agree({"first evaluation": "fits"}, (int(depends[0]), int(depends[1])))
            some = any if group.spread else all
            depends = some(row[0] for row in every), some(row[1] for row in every)
        if not depends[0]:
            raise ValueError("loss(z, x) must depend on z or x, got one that depends on neither through autograd")
        if not depends[1]:
            raise ValueError(
                "f(z, x) must be differentiable in x, got one that does not depend on it through autograd; is x used "
                "under no_grad or detached?"
            )
        return fz


def gradients(
    fz: list[Tensor], mu: list[Tensor], cost: Tensor, inputs: list[Tensor], create_graph: bool = False
) -> list[Tensor]:
    """P = l_z + f_z^T mu and q = l_x + f_x^T mu, for the tensors of z and x that f and the loss were given."""
    outputs = [t for t in (*fz, cost) if t.requires_grad]
    weights = [m.to(t.dtype) for t, m in zip(fz, mu, strict=True) if t.requires_grad]
    weights += [torch.ones_like(cost)] if cost.requires_grad else []
    found = torch.autograd.grad(outputs, inputs, weights, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(t) if gradient is None else gradient for t, gradient in zip(inputs, found, strict=True)]


def check_alike(z: Layout, x: Layout) -> None:
    """Raise ValueError unless x0 has the batch, precision and device of z0."""
    batch = (z.B, x.B) if len(z.batch_shape) == len(x.batch_shape) == 1 else (z.batch_shape, x.batch_shape)
    for what, (a, b) in {"batch": batch, "precision": (z.dtype, x.dtype), "device": (z.device, x.device)}.items():
        if a != b:
            raise ValueError(f"x0 must have the {what} of z0, expected {a}, got {b}")


def check_cost(cost: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the loss gave one real number a sample."""
    if not isinstance(cost, Tensor) or cost.shape != shape or not cost.is_floating_point():
        got = f"{tuple(cost.shape)} {cost.dtype}" if isinstance(cost, Tensor) else type(cost).__name__
        expected = f"expected {tuple(shape)} of a floating dtype"
        raise ValueError(f"loss(z, x) must return one number a sample, {expected}, got {got}")


def ordinary(tree: Any) -> Any:
    """The tree with copies of tensors that were made in inference mode, which autograd cannot keep."""
    return pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) and t.is_inference() else t, tree)


def _depends(outputs: list[Tensor], on: list[Tensor]) -> bool:
    """Whether autograd's graph leads from one of the outputs to one of the leaves."""
    wanted = {id(t) for t in on}
    if any(id(t) in wanted for t in outputs):
        return True
    todo = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if id(getattr(node, "variable", None)) in wanted:
            return True
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        todo += new
    return False


def _broadcasts(t: Tensor, shape: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(t.shape, shape) == shape
    except RuntimeError:
        return False
