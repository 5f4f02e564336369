"""scikit-learn's handwritten digits, the real data that ships with a wheel."""

from __future__ import annotations

from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Pixels in [0, 1] as (1797, 64) float64, and labels (1797,)."""
    data = load_digits()
    return torch.from_numpy(data.data / 16.0), torch.from_numpy(data.target).long()
