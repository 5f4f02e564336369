"""The solvers of others, by their names, arguments and results, made by deqfast's.

``dq.compat.torchdeq``, ``dq.compat.locuslab``, ``dq.compat.scipy``, ``dq.compat.xitorch``, ``dq.compat.jaxopt``. None
of them needs the library that it stands in for, but for ``torchdeq.install``. An argument that a library does not have
is a ``TypeError``, an option without a meaning here is said once by name (``IgnoredOption``), and a solve that did not
converge is an exception or a ``ConvergenceWarning``; torchdeq's solvers say it in their statistics.
"""

from __future__ import annotations

from .. import compiled as _compiled
from . import jaxopt, locuslab, scipy, torchdeq, xitorch
from ._names import IgnoredOption

_compiled.skip_frames_of(__name__)

__all__ = ["IgnoredOption", "jaxopt", "locuslab", "scipy", "torchdeq", "xitorch"]
