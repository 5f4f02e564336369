"""Anderson acceleration: options, and the workspace they ask for.

Symbols: x_k iterate, f_k = f(x_k), g_k = f_k - x_k residual, columns dF_j = f_{j+1} - f_j and dG_j = g_{j+1} - g_j, m
columns, W the test space. Every member of the family solves (W^T dG) gamma = W^T g_k and steps to

    x_{k+1} = x_k + beta g_k - (dF - (1 - beta) dG) gamma.

The choice of W is the ``type``: dX = dF - dG is Type I, -dG is Type II (least squares), and dX - dG is "mixed", which
needed the fewest evaluations and failed least over the convergence suite (docs/benchmarks.md). Systems are normalised
per sample by the norms of their columns, so that a ridge is a number without units. Type II's Gram matrix is symmetric
positive definite: Cholesky; the others are not symmetric: LU with partial pivoting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..naming import named
from ..ops import hosted
from ..ops.anderson import HISTORY_DTYPES, AndersonMethod, AndersonWorkspace, most_given_up
from ..ops.codes import Evict
from ..ops.layout import Layout
from ..ops.workspace import Stopping
from ..options import check_choice, check_dtype, check_fraction, check_int, check_number
from .base import Solver

_TEST_SPACE = {"mixed": 2.0, 1: 1.0, 2: 0.0}


# When a column of the mixed test space is turned (``ops/formulas/anderson.py``). The larger is, the more of the columns
# that do well as they are it takes along; of few columns a row that says nothing cannot be made up for by others.
TURN, TURN_OF_FEW, FEW = 0.1, 0.2, 5


@named("solver", tau="mixing", beta="mixing", lam="ridge", lamb="ridge", hsize="m", window="m", history_size="m", M="m")
@dataclass(frozen=True)
class Anderson(Solver):
    """Anderson acceleration.

    Args:
        m: columns of history, at least 1. More columns, fewer evaluations, up to about 20; a sample of fewer than m
            numbers uses as many columns as it has numbers.
        type: "mixed" (default), 1 or 2; 2 is the textbook least-squares form.
        mixing: beta in (0, 1]; below 1 it usually costs evaluations, and helps only maps whose single application
            overshoots.
        ridge: regularisation of the normalised small system. Default 1e-4 for mixed and Type I in 32 bits and less,
            1e-6 in float64; Type II 1e-6 and 1e-10.
        history_dtype: what columns are stored in: the state's dtype, torch.float32, bfloat16, float16 or int8 (the
            last two with a power-of-two scale per 1024 numbers). Default: bfloat16 for states of 32 bits and less,
            float64 for float64. Iterates and residuals are never rounded, so this does not limit the answer.
        evict: which column a full history gives up: "least_useful" (default) or "oldest".
        mix_every: p, at least 1 (default). Only every p-th evaluation of a sample solves for gamma and mixes; those
            between take the plain step, with their columns recorded all the same. For large states whose steps are
            bound by memory, with more columns (m=20): a step without a mix moves fewer bytes. At most m less the
            max(2, m // 3) newest columns; for samples of so few numbers that m shrinks, as many as then fit.
        history_device: where columns are. None (default): with the state. "cpu": in the host's pinned memory, for a
            state on a GPU beside which they do not fit. Every step then reads them over the link, 3 m N numbers a
            sample, 2 m N with ``type=2``, and takes about as long as that; ``backend="torch"`` makes it, which "auto"
            takes. For a state that is in the host's memory anyway it is a ``ValueError``.

    Source: Walker and Ni, SIAM J. Numer. Anal. 49 (2011); Fang and Saad, Numer. Linear Algebra Appl. 16 (2009).
    Not for: maps that plain iteration contracts in a few steps, where ``Picard`` is cheaper.
    """

    m: int = 10
    type: Literal["mixed", 1, 2] = "mixed"
    mixing: float = 1.0
    ridge: float | None = None
    history_dtype: torch.dtype | None = None
    evict: Literal["least_useful", "oldest"] = "least_useful"
    mix_every: int = 1
    history_device: Literal["cpu"] | None = None

    def __post_init__(self) -> None:
        check_int("m", self.m, hint="; for no history use dq.Picard()")
        if isinstance(self.type, bool) or not isinstance(self.type, (str, int)) or self.type not in _TEST_SPACE:
            raise ValueError(f"type must be 'mixed', 1 or 2, got {self.type!r}")
        check_fraction("mixing", self.mixing)
        if self.ridge is not None:
            check_number("ridge", self.ridge)
            if not 0 <= self.ridge < 1:
                raise ValueError(f"ridge must be in [0, 1), got {self.ridge}")
        check_dtype("history_dtype", self.history_dtype, HISTORY_DTYPES)
        check_choice("evict", self.evict, ("least_useful", "oldest"))
        check_choice("history_device", self.history_device, (None, "cpu"))
        check_int("mix_every", self.mix_every)
        if self.mix_every > most_given_up(self.m):
            raise ValueError(
                f"mix_every must be at most {most_given_up(self.m)} with m={self.m}, got {self.mix_every}: "
                "so many columns are given up between two mixes"
            )

    @property
    def uses_previous(self) -> bool:
        """The step reads f at the previous iterate."""
        return True

    def workspace(self, layout: Layout, stopping: Stopping) -> AndersonWorkspace:
        """The memory this solver needs for states of ``layout``."""
        wide = layout.dtype == torch.float64
        default_ridge = (1e-10 if wide else 1e-6) if self.type == 2 else (1e-6 if wide else 1e-4)
        history_dtype = self.history_dtype or (torch.float64 if wide else torch.bfloat16)
        if history_dtype == torch.float64 and not wide:
            raise ValueError(f"history_dtype=torch.float64 needs a float64 state, got {layout.dtype}")
        if self.history_device is not None and layout.device.type in hosted.SHARED:
            raise ValueError(
                f"history_device={self.history_device!r} is for a state on a device with memory of its own, got one on "
                f"{layout.device}; history_dtype=torch.bfloat16 or torch.int8 and fewer columns m take less memory"
            )
        m = min(self.m, max(1, layout.total))  # more columns than numbers are linearly dependent
        method = AndersonMethod(
            m=m,
            test_space=_TEST_SPACE[self.type],
            mixing=self.mixing,
            ridge=default_ridge if self.ridge is None else self.ridge,
            evict=Evict[self.evict.upper()],
            mix_every=min(self.mix_every, most_given_up(m)),
            turn=0.0 if self.type != "mixed" else TURN if m >= FEW else TURN_OF_FEW,
        )
        kind = AndersonWorkspace if self.history_device is None else hosted.HostedWorkspace
        return kind(layout, stopping, method, history_dtype)
