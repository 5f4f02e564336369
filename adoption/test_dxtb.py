"""dxtb: tight binding (GFN1-xTB) of seven molecules, alone and as one padded batch.

Its implicit mode calls ``xitorch.optimize.equilibrium`` for the potential; that one function is replaced. Its default
mode mixes and unrolls, in a loop of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import deqfast as dq
from adoption.molecules import MOLECULES
from adoption.rows import Counted, Record, Row, in_turns

NAMES = ("LiH", "H2O", "NH3", "CH4", "CO", "HF", "C2H4")
BOHR = 0.529177210903  # Angstrom
TOLERANCE = 1e-8
KEPT = ("alpha", "f_tol", "f_rtol", "x_tol", "x_rtol", "maxiter", "verbose", "line_search")
Equilibrium = Callable[..., Tensor]


def fixed_point(f: Callable[..., Tensor], y0: Tensor, params: Any = (), *_: Any, **options: Any) -> Tensor:
    """A molecule is a sample; y0 is (rows, orbitals), or (molecules, rows, orbitals)."""
    dims = y0.dim() - 2
    solution = dq.fixed_point(
        f, y0, tuple(params), batch_dims=dims, rtol=0.0, atol=options["f_tol"], max_iter=options["maxiter"]
    )
    assert solution.converged.all()
    z: Tensor = solution.z
    return z


def by_name(
    f: Callable[..., Tensor], y0: Tensor, params: Any = (), bck_options: Any = None, method: Any = None, **options: Any
) -> Tensor:
    """``dq.compat.xitorch``; dxtb hands over options that are its own beside xitorch's."""
    known = {name: options[name] for name in KEPT}
    return dq.compat.xitorch.equilibrium(f, y0, params, bck_options, method, **known)


class Molecules:
    """Energies, forces, and evaluations of the self-consistent map."""

    def __init__(self, *names: str) -> None:
        from tad_mctc.batch import pack
        from tad_mctc.convert import symbol_to_number

        atoms = [[atom.split() for atom in MOLECULES[name].split(";")] for name in names]
        numbers = [symbol_to_number([atom[0] for atom in molecule]) for molecule in atoms]
        places = [
            torch.tensor([[float(x) for x in atom[1:]] for atom in molecule], dtype=torch.float64) / BOHR
            for molecule in atoms
        ]
        single = len(names) == 1
        self.numbers: Tensor = numbers[0] if single else pack(numbers)
        self.positions: Tensor = places[0] if single else pack(places)

    def solve(self, equilibrium: Equilibrium | None, mode: str = "implicit") -> tuple[Tensor, Tensor, int]:
        """``equilibrium``: what is called in place of xitorch's, or None for itself."""
        import dxtb
        from dxtb._src.exlibs.xitorch import optimize
        from dxtb._src.scf.base import BaseSCF

        options = {"verbosity": 0, "f_atol": TOLERANCE, "x_atol": TOLERANCE, "scf_mode": mode}
        batch = self.numbers.dim() > 1
        calculator = dxtb.Calculator(
            self.numbers, dxtb.GFN1_XTB, opts={**options, "batch_mode": int(batch)}, dtype=torch.float64
        )
        positions = self.positions.clone().requires_grad_()
        own, counted = optimize.equilibrium, Counted(lambda: None)
        unrolled = BaseSCF.iterate_potential

        def watched(fcn: Callable[..., Tensor], **kwargs: Any) -> Tensor:
            def f(*args: Any) -> Tensor:
                counted()
                return fcn(*args)

            found: Tensor = (equilibrium or own)(f, **kwargs)
            return found

        def iterate(scf: Any, potential: Tensor) -> Tensor:
            counted()
            found: Tensor = unrolled(scf, potential)
            return found

        optimize.equilibrium, BaseSCF.iterate_potential = watched, iterate
        try:
            charge = torch.zeros(self.numbers.shape[:-1], dtype=torch.float64)
            energy = calculator.energy(positions, chrg=charge)
            (gradient,) = torch.autograd.grad(energy.sum(), positions)
        finally:
            optimize.equilibrium, BaseSCF.iterate_potential = own, unrolled
        return energy.detach(), -gradient, counted.calls


def compare(molecules: Molecules, record: Record, problem: str, **how: Any) -> None:
    own_name = how.pop("own", "xitorch's Broyden")
    ours_by = how.pop("ours", fixed_point)
    note = "" if how else "own stops when its step is below 1e-8 too"
    if ours_by is not fixed_point:
        note = "`dq.compat.xitorch.equilibrium`"
    own = molecules.solve(None, **how)
    ours = molecules.solve(ours_by)
    record.add(
        Row(
            package="dxtb",
            problem=f"{problem}: energies and forces",
            own=own_name,
            evaluations=(own[2], ours[2]),
            ratio=in_turns(lambda: molecules.solve(None, **how), lambda: molecules.solve(ours_by), budget=8.0),
            difference=float((own[1] - ours[1]).abs().max()),
            within=1e-6,
            note=note,
        )
    )
    assert float((own[0] - ours[0]).abs().max()) <= 1e-8
    assert float((own[1] - ours[1]).abs().max()) <= 1e-6
    assert ours[2] <= own[2]


@pytest.fixture(autouse=True)
def quiet() -> None:
    pytest.importorskip("dxtb").OutputHandler.verbosity = 0


@pytest.mark.parametrize("name", NAMES)
def test_a_molecule_alone(name: str, record: Record) -> None:
    compare(Molecules(name), record, name)


def test_seven_molecules_in_one_batch(record: Record) -> None:
    compare(Molecules(*NAMES), record, "seven molecules in one batch")


def test_one_batch_by_the_same_name(record: Record) -> None:
    compare(Molecules(*NAMES), record, "seven molecules in one batch", ours=by_name)


def test_one_batch_against_the_default_mode(record: Record) -> None:
    compare(Molecules(*NAMES), record, "seven molecules in one batch", own="default: unrolled mixer", mode="full")
