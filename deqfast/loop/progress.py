"""A bar of evaluations."""

from __future__ import annotations

from typing import Any


def progress_bar(total: int) -> Any:
    """A tqdm bar of ``total`` evaluations."""
    try:
        from tqdm.auto import tqdm  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install 'deqfast[progress]'") from error
    return tqdm(total=total, unit="evaluation", leave=False)
