"""``python -m deqfast.compare module:function``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import deqfast.compare as compared

from .load import LoadError, named_old, problem


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, print the table, and write what was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m deqfast.compare",
        description="Your f with your solver and with deqfast's: time, evaluations, residual, gradients, a verdict.",
    )
    parser.add_argument("problem", help="module:function or file.py:function that returns (f, z0) or a dict of them")
    parser.add_argument(
        "--old", default="torchdeq.anderson", help=f"{', '.join(compared.OLD)}, or module:function of (f, z0) -> z"
    )
    parser.add_argument("--solver", action="append", help="of deqfast: anderson, broyden, picard; may be repeated")
    parser.add_argument("--rtol", type=float, help="relative residual to reach; default by dtype")
    parser.add_argument("--max-iter", type=int, default=200, help="evaluations at most (200)")
    parser.add_argument("--rounds", type=int, default=9, help="turns (9)")
    parser.add_argument("--seconds", type=float, default=20.0, help="that the turns may take in all (20)")
    parser.add_argument("--out", help="a picture to write: .png, .pdf or .svg (needs matplotlib)")
    parser.add_argument("--json", help="a file to write the numbers to")
    options = parser.parse_args(arguments)
    try:
        found = problem(options.problem)
        old = named_old(options.old, compared.OLD)
    except LoadError as error:
        parser.error(str(error))
    try:
        comparison = compared.compare(
            **found,
            old=old,
            solvers=options.solver,
            rtol=options.rtol,
            max_iter=options.max_iter,
            rounds=options.rounds,
            seconds=options.seconds,
        )
    except (ImportError, TypeError, ValueError) as error:
        if not _is_ours(error):
            raise  # f's own, with its traceback
        parser.error(str(error))
    print(comparison)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(comparison.to_dict(), file, indent=1)
    if options.out:
        try:
            comparison.plot(options.out)
        except ImportError as error:
            raise SystemExit(str(error)) from None
        print(f"\nwrote {options.out}")


def _is_ours(error: BaseException) -> bool:
    """Whether it was raised by this package, about an argument."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and str(traceback.tb_frame.f_globals.get("__name__", "")).startswith("deqfast.")


if __name__ == "__main__":
    main()
