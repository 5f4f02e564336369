"""Arguments by the names that others gave them: unknown ones refused, those without a meaning here said once."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable

from ..naming import did_you_mean
from ..nn import ConvergenceWarning

# Names for one thing, in whichever library.
_SAME = (
    ("eps", "tol", "f_tol", "fatol", "rtol", "f_rtol"),
    ("threshold", "max_iter", "maxiter", "max_niter", "iter"),
    ("m", "M", "history_size", "msize"),
    ("lam", "ridge", "w0", "lmbda"),
    ("beta", "tau", "mixing", "alpha"),
    ("f", "F", "fun", "fcn", "fixed_point_fun"),
)
_said: set[tuple[str, str]] = set()


class IgnoredOption(UserWarning):
    """An option of another library that has no meaning here; said once a function and name."""


def refuse(function: str, unknown: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError if there is any unknown argument, with those that ``function`` takes and the nearest of them."""
    names = list(known)
    for name in unknown:
        same = [other for group in _SAME if name in group for other in group if other in names]
        meant = f"; did you mean {same[0]!r}?" if same else did_you_mean(name, names)
        raise TypeError(f"{function}() got an unknown argument {name!r}{meant}; it takes {', '.join(names)}")


def ignored(function: str, names: Iterable[str], why: str) -> None:
    """Say once that options are not used, and why."""
    new = [name for name in names if (function, name) not in _said]
    if new:
        _said.update((function, name) for name in new)
        listed = ", ".join(f"{name}=" for name in new)
        warnings.warn(f"{function}() does not use {listed}: {why}", IgnoredOption, stacklevel=_caller())


def unsolved(function: str, found: float, asked: float, evaluations: int, more: str = "") -> None:
    """Warn that a solve did not reach its tolerance."""
    message = f"{function}() did not converge: residual {found:.3g} after {evaluations} evaluations, asked {asked:.3g}"
    warnings.warn(message + more, ConvergenceWarning, stacklevel=_caller())


def _caller() -> int:
    """The stacklevel of the first frame above that is not this package's."""
    level, frame = 1, sys._getframe(1)
    package = __name__.partition(".")[0] + "."
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(package):
        level, frame = level + 1, frame.f_back
    return level
