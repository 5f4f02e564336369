"""Whether the Triton kernels can serve a device.

Triton is imported when a solve first asks for it. CUDA builds of torch bring it along; on a CPU its interpreter runs
the same kernels, if ``TRITON_INTERPRET=1`` is set before they are loaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys

import torch

OLDEST = (3, 6)
OLDEST_CAPABILITY = (8, 0)


def why_not(device: torch.device) -> str | None:
    """Why the Triton kernels cannot serve ``device``, or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        if not _interpreted():
            return "Triton needs a GPU; for its interpreter set TRITON_INTERPRET=1 before the first solve"
    elif device.type != "cuda":
        return f"there are no Triton kernels for device type {device.type!r}"
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < OLDEST:
        return f"triton {'.'.join(map(str, OLDEST))} or newer is needed, found {version}"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            return f"compute capability 8.0 or newer is needed, found {capability[0]}.{capability[1]}"
    return None


def _interpreted() -> bool:
    """Whether the kernels run, or would run if loaded now, in Triton's interpreter."""
    kernels = sys.modules.get("deqfast.kernels.measure")
    if kernels is not None:
        return type(kernels.judge).__name__ == "InterpretedFunction"
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
