"""torch-sla: nonlinear systems of its own documentation on its own matrices, with the gradient of its adjoint.

Its Picard and Anderson take u - F(u) for the next iterate, which is ``dq.root`` of -F. Both are asked for
||F(u)|| <= 1e-8 ||F(0)||, and for the adjoint to 1e-8. Its Newton comes in three forms: by conjugate gradients, an
evaluation and a vjp each; with a sparse Jacobian of the caller's; and as a method of its matrix, which makes the whole
Jacobian by vjps. The last two factorise it; all others solve for the adjoint by conjugate gradients too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import deqfast as dq
from adoption.rows import Counted, Passes, Record, Row, apart, in_turns

TOLERANCE = 1e-8
LIMIT = 3000
WITHIN = 1e-5  # of the solution and of the gradient
NEWTON, GIVEN, MATRIX = "newton", "newton, jacobian_fn", "newton of the matrix"
METHODS = {
    "picard": "Picard",
    "anderson": "Anderson",
    NEWTON: "Newton, conjugate gradients",
    GIVEN: "Newton, the caller's Jacobian, SciPy's LU",
    MATRIX: "`SparseTensor.nonlinear_solve`, Newton",
}
SYSTEMS = ("A u + u^2 = f", "A u + c u^3 = f", "A u + u^2 = f, A with upwind convection", "Bratu, u = A^-1 p exp(u)")
Residual = Callable[..., Tensor]
Answer = tuple[Tensor, Tensor, int]


@dataclass(frozen=True)
class System:
    """F(u, parameter) = 0 from u = 0, by torch_sla's matrix, the same by a dense one, and for Newton without A^-1."""

    matrix: Any
    residual: Residual
    dense: Residual
    undivided: Residual
    jacobian: Callable[..., Any]
    parameter: Tensor
    size: int

    @property
    def start(self) -> Tensor:
        return torch.zeros(self.size, dtype=torch.float64)

    def theirs(self, method: str) -> Answer:
        from torch_sla import nonlinear_solve

        options: dict[str, Any] = {"tol": TOLERANCE, "atol": 0.0}
        if method == MATRIX:
            return self.step(
                lambda F, p: self.matrix.nonlinear_solve(lambda u, _, p: F(u, p), self.start, p, **options),
                self.undivided,
            )
        if method == GIVEN:
            direct = {"method": "newton", "linear_solver": "scipy", "linear_method": "lu", "jacobian_fn": self.jacobian}
            return self.step(lambda F, p: nonlinear_solve(F, self.start, p, **direct, **options), self.undivided)
        if method != NEWTON:  # whose 50 steps are its default
            options["max_iter"] = LIMIT
        return self.step(lambda F, p: nonlinear_solve(F, self.start, p, method=method, **options))

    def ours(self) -> Answer:
        def solve(F: Residual, p: Tensor) -> Tensor:
            with torch.no_grad():
                first = float(F(self.start, p).norm())
            options: dict[str, Any] = {"rtol": 0.0, "atol": TOLERANCE * first, "max_iter": LIMIT, "throw": True}
            backward = dq.Implicit(rtol=TOLERANCE)
            solution = dq.root(lambda u, p: -F(u, p), self.start, (p,), batch_dims=0, backward=backward, **options)
            z: Tensor = solution.z
            return z

        return self.step(solve)

    def step(self, solve: Callable[[Residual, Tensor], Tensor], residual: Residual | None = None) -> Answer:
        """The solution, the gradient of its sum by the parameter, evaluations and vjps."""
        made = residual or self.residual
        counted = Counted(lambda u, p: Passes.apply(made(u, p)))
        Passes.count = 0
        parameter = self.parameter.clone().requires_grad_()
        u = solve(counted, parameter)
        u.sum().backward()
        assert parameter.grad is not None
        return u.detach(), parameter.grad, counted.calls + Passes.count

    def exact(self) -> tuple[Tensor, Tensor]:
        """Newton and the adjoint with the dense Jacobian, to rounding."""
        u = self.start
        for _ in range(30):
            jacobian = torch.func.jacrev(self.dense)(u, self.parameter)
            u = u - torch.linalg.solve(jacobian, self.dense(u, self.parameter))
        jacobian = torch.func.jacrev(self.dense)(u, self.parameter)
        adjoint = torch.linalg.solve(jacobian.T, torch.ones_like(u))
        pulled: Any = torch.func.vjp(lambda p: self.dense(u, p), self.parameter)
        return u, -pulled[1](adjoint)[0]


def system(name: str) -> System:
    sla = pytest.importorskip("torch_sla")
    from torch_sla import datasets

    plain, cubic, upwind, bratu = SYSTEMS
    make = {plain: datasets.poisson_2d, cubic: datasets.poisson_2d, upwind: datasets.advection_diffusion_2d}
    problem = datasets.bratu_1d(100) if name == bratu else make[name](15)
    A = sla.SparseTensor(problem.val, problem.row, problem.col, problem.shape)
    full = torch.zeros(problem.shape, dtype=torch.float64)
    full.index_put_((problem.row, problem.col), problem.val, accumulate=True)
    diagonal = float(full[0, 0])
    ones = torch.ones(problem.shape[0], dtype=torch.float64)
    f = ones if problem.rhs is None else problem.rhs

    rows = torch.arange(problem.shape[0])

    def stored(values: Tensor, slope: Tensor) -> Any:
        """A's entries and a diagonal, in coordinates."""
        return torch.cat([values, slope]), *(torch.cat([i, rows]) for i in (problem.row, problem.col)), problem.shape

    if name == bratu:
        factors = torch.linalg.lu_factor(full)

        def source(u: Tensor, p: Tensor) -> Tensor:
            return p * u.exp()

        given = torch.tensor(problem.meta["lam"], dtype=torch.float64)
        return System(
            A,
            lambda u, p: u - A.solve(source(u, p)),
            lambda u, p: u - torch.linalg.lu_solve(*factors, source(u, p)[:, None])[:, 0],
            lambda u, p: A @ u - source(u, p),
            lambda u, p: stored(problem.val, -source(u, p)),
            given,
            problem.shape[0],
        )

    def left(matrix: Any, u: Tensor, p: Tensor) -> Tensor:
        of_u = matrix @ u + p * u**3 - f if name == cubic else matrix @ u + u**2 - p
        return of_u / diagonal

    given = torch.tensor(1.0, dtype=torch.float64) if name == cubic else f

    def sparse(u: Tensor, p: Tensor) -> Tensor:
        return left(A, u, p)

    def jacobian(u: Tensor, p: Tensor) -> Any:
        slope = 3 * p * u**2 if name == cubic else 2 * u
        return stored(problem.val / diagonal, slope / diagonal)

    return System(A, sparse, lambda u, p: left(full, u, p), sparse, jacobian, given, problem.shape[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SYSTEMS)
def test_solution_and_adjoint(name: str, method: str, record: Record) -> None:
    problem = system(name)
    u, gradient = problem.exact()
    own, ours = problem.theirs(method), problem.ours()
    far, near = (tuple(map(apart, (u, gradient), answer[:2])) for answer in (own, ours))
    right = max(far) <= WITHIN
    counted = {
        MATRIX: "whole Jacobians, of as many vjps at once as there are unknowns",
        GIVEN: "evaluations and vjps together, beside a factorisation a step",
    }.get(method, "evaluations and vjps together")
    record.add(
        Row(
            package="torch-sla",
            problem=f"{name}, {problem.size} unknowns, solution and gradient, 1e-8",
            own=METHODS[method],
            evaluations=(None if method == MATRIX else own[2], ours[2]),
            ratio=in_turns(lambda: problem.theirs(method), problem.ours, budget=2.0, least=5) if right else None,
            difference=max(near),
            within=WITHIN,
            solved=(right, max(near) <= WITHIN),
            note=f"{counted}; solution and gradient from those of the dense Jacobian: "
            f"{far[0]:.0e}, {far[1]:.0e} own, {near[0]:.0e}, {near[1]:.0e} deqfast's"
            + (
                "; conjugate gradients, of a Jacobian that is not symmetric" if name == SYSTEMS[2] and not right else ""
            ),
        )
    )
    assert float(problem.dense(u, problem.parameter).abs().max()) <= 1e-13
    assert max(near) <= WITHIN
    if method in ("picard", "anderson"):
        assert ours[2] <= own[2]
