"""silva-networks: its equilibrium models, whose every solve goes through one function of it; that one is replaced.

Its own tolerance is an absolute one of the same norm, so both are asked for the same.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import deqfast as dq
from adoption.rows import Counted, Passes, Record, Row, apart, in_turns

STEPS = 1500  # unrolled and damped
LIMIT = 1000
WITHIN = 1e-3  # of the gradient
Solve = Callable[..., Any]


def by_deqfast(f: Callable[[Tensor], Tensor], z0: Tensor, config: Any, **_: Any) -> Any:
    """``solve_equilibrium``'s place: the same tolerance, limit and samples, deqfast's own defaults for the rest."""
    options: dict[str, Any] = {"rtol": 0.0, "atol": config.tol, "max_iter": config.max_iter}
    backward = dq.Implicit(rtol=config.backward_tol)
    solution = dq.fixed_point(f, z0, batch_dims=config.anderson_batch_dims, backward=backward, **options)
    result = importlib.import_module("silva_networks").SolverResult
    return result(solution.z, [float(solution.residual.max())], solution.nfe, bool(solution.converged.all()), "deqfast")


def unrolled(f: Callable[[Tensor], Tensor], z0: Tensor, config: Any, **_: Any) -> Any:
    """Every step of a long damped iteration in the graph: nothing of either package's solvers or gradients."""
    z = z0
    for _step in range(STEPS):
        z = 0.5 * z + 0.5 * f(z)
    result = importlib.import_module("silva_networks").SolverResult
    residual = float((f(z) - z).detach().norm())
    return result(z, [residual], STEPS, residual <= 1e-12, "unrolled")


@contextmanager
def counting(where: str, solve: Solve | None) -> Iterator[Counted]:
    """Evaluations and vjps of what ``silva_networks.<where>`` solves, by ``solve`` or by itself."""
    module: Any = importlib.import_module(f"silva_networks.{where}")
    own, counted = module.solve_equilibrium, Counted(Passes.apply)
    Passes.count = 0

    def watched(f: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        return (solve or own)(lambda z: counted(f(z)), *args, **kwargs)

    module.solve_equilibrium = watched
    try:
        yield counted
    finally:
        module.solve_equilibrium = own


@dataclass(frozen=True)
class Answer:
    """A state, its loss's gradient by all parameters, evaluations and vjps, and what the solver says of itself."""

    state: Tensor
    gradient: Tensor
    work: int
    converged: bool


@dataclass(frozen=True)
class Task:
    """A model of silva_networks, the module of it that solves, and its inputs."""

    where: str
    model: Any
    inputs: tuple[Tensor, ...]

    def double(self) -> Task:
        inputs = tuple(x.double() if x.is_floating_point() else x for x in self.inputs)
        return Task(self.where, copy.deepcopy(self.model).double(), inputs)

    def step(self, solve: Solve | None) -> Answer:
        self.model.zero_grad()
        with counting(self.where, solve) as counted:
            found = self.model(*self.inputs, return_result=True)
            result = getattr(found, "solver_result", found)
            # Of normalised states every mean square is the same, and has no gradient.
            weights = torch.randn(result.z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            (result.z * weights.to(result.z.dtype)).mean().backward()
        flat = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
        return Answer(result.z.detach(), flat, counted.calls + Passes.count, bool(result.converged))


MODELS = ("affine-tanh block", "graph layer", "monotone graph", "implicit graph network", "subhomogeneous")


def task(name: str) -> Task:
    """Its own classes with their starting weights and options."""
    silva = pytest.importorskip("silva_networks")
    torch.manual_seed(0)
    if name == "affine-tanh block":
        return Task("implicit", silva.SILVAFixedPointBlock(16, 64), (torch.randn(32, 16),))
    if name == "subhomogeneous":
        return Task("source_equilibria", silva.SILVASubhomogeneousEquilibrium(16, 32, 4), (torch.rand(32, 16),))
    ring = torch.stack([torch.arange(40), (torch.arange(40) + 1) % 40])
    where, model = {
        "graph layer": ("layers", silva.SILVAGraphLayer),
        "monotone graph": ("advanced_equilibria", silva.SILVAMonotoneGraphEquilibrium),
        "implicit graph network": ("cases", silva.SILVAImplicitGraphNetwork),
    }[name]
    sizes = (6, 32) if name == "graph layer" else (6, 16, 3)
    return Task(where, model(*sizes), (torch.randn(40, 6), torch.cat([ring, ring.flip(0)], 1)))


def described(config: Any) -> str:
    how = f", {config.backward_solver} backward" if config.backward_mode == "implicit" else ", unrolled"
    return f"{config.solver.title()}{how}"


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_training_step(name: str, exact: bool, record: Record) -> None:
    """With the model's own options in float32, and in float64 with the limit raised and its implicit gradient."""
    given = task(name)
    truth = given.double().step(unrolled)
    partial = given.model.config.solver == "anderson" and given.model.config.backward_mode == "unrolled" and not exact
    if exact:
        given = given.double()
        raised = {"max_iter": LIMIT, "backward_mode": "implicit", "backward_max_iter": LIMIT}
        given.model.config = replace(given.model.config, **raised)
    config = given.model.config
    own, ours = given.step(None), given.step(by_deqfast)
    states = [apart(truth.state, found.state.double()) for found in (own, ours)]
    far, near = (float((found.gradient - truth.gradient).norm() / truth.gradient.norm()) for found in (own, ours))
    right = [found.converged and error <= WITHIN for found, error in ((own, far), (ours, near))]
    options = f"float64, limit {LIMIT}" if exact else "its defaults"
    record.add(
        Row(
            package="silva-networks",
            problem=f"{name}, training step, {options}, {config.tol:.0e}",
            own=described(config),
            evaluations=(own.work, ours.work),
            ratio=in_turns(lambda: given.step(None), lambda: given.step(by_deqfast), budget=2.0, least=5),
            difference=near,
            within=WITHIN,
            solved=(right[0], right[1]),
            note="evaluations and vjps together; solution and gradient from "
            f"{STEPS} unrolled steps: {states[0]:.0e}, {far:.0e} own, {states[1]:.0e}, {near:.0e} deqfast's"
            + ("; own's history has no graph, so its gradient is that of the last steps alone" if partial else "")
            + "".join(
                f"; {who} reached its limit of evaluations"
                for who, found in (("own", own), ("deqfast", ours))
                if not found.converged
            ),
        )
    )
    assert truth.converged
    assert near <= max(WITHIN, far)
    if own.converged:
        assert ours.work <= own.work
    if exact:
        assert ours.converged
        assert max(states[1], near) <= WITHIN
