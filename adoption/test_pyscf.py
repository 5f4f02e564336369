"""PySCF: Hartree-Fock, its DIIS replaced by deqfast's stepper with the commutator as a residual of its own.

Type II Anderson of a residual of one's own is Pulay's commutator DIIS: z is the Fock matrix that was diagonalised, f(z)
the one of the density that came out, and weights minimise ||FDS - SDF||.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import deqfast as dq
from adoption.molecules import MOLECULES
from adoption.rows import Record, Row, in_turns
from deqfast.ops.codes import TINY

COLUMNS = 7  # of differences: PySCF keeps eight Fock matrices


def stepper(diis: Any) -> Any:
    """PySCF's DIIS class with deqfast's steps."""

    class Stepped(diis.CDIIS):
        state: Any = None
        last: Any = None  # of the newest solve

        def update(self, s: Any, d: Any, f: Any, *args: Any, **kwargs: Any) -> Any:
            fock = torch.from_numpy(np.array(f))
            if self.state is None:
                method = dq.Anderson(type=2, m=COLUMNS)
                self.state = method.init(torch.zeros_like(fock), rtol=0.0, max_iter=1000, batch_dims=0)
                type(self).last = self.state
            commutator = torch.from_numpy(diis.get_err_vec(s, d, f, self.Corth))
            # A commutator of exactly 0 is a solution; the state then stays where it was.
            return f if self.state.step(fock, residual=commutator) else self.state.z.numpy()

    return Stepped


@pytest.mark.parametrize("basis", ["sto-3g", "6-31g"])
@pytest.mark.parametrize("name", MOLECULES)
def test_hartree_fock(name: str, basis: str, record: Record) -> None:
    pytest.importorskip("pyscf")
    from pyscf import gto, scf
    from pyscf.scf import diis

    molecule = gto.M(atom=MOLECULES[name], basis=basis, verbose=0)
    Stepped = stepper(diis)

    def solve(ours: bool) -> Any:
        mean_field = scf.RHF(molecule)
        mean_field.conv_tol = 1e-10
        if ours:
            mean_field.DIIS = Stepped
        mean_field.kernel()
        return mean_field

    own, ours = solve(False), solve(True)
    state = Stepped.last
    row = record.add(
        Row(
            package="pyscf",
            problem=f"Hartree-Fock, {name}, {basis}",
            own="DIIS, 8 matrices",
            evaluations=(own.cycles, ours.cycles),
            ratio=in_turns(lambda: solve(False), lambda: solve(True), budget=2.0) if basis == "6-31g" else None,
            difference=abs(own.e_tot - ours.e_tot),
            within=1e-8,
            solved=(bool(own.converged), bool(ours.converged)),
            note=f"a residual of one's own, `backend={state.backend!r}`",
        )
    )
    assert own.converged
    assert ours.converged
    assert row.difference is not None
    assert row.difference <= 1e-8
    assert ours.cycles <= own.cycles + 1
    # Below, the small matrices would be larger than the history.
    assert state.z.numel() <= TINY or state.backend == "native"
