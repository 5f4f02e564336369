"""The logger "deqfast": at level DEBUG a line for every solve, forward, backward and joint."""

from __future__ import annotations

import logging

LOG = logging.getLogger("deqfast")
LOG.addHandler(logging.NullHandler())


def telling() -> bool:
    """Whether somebody listens; what is said reads numbers from the device."""
    return LOG.isEnabledFor(logging.DEBUG)
