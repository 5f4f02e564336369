"""All clients on one machine, in Flower's simulation.

`run_simulation` is what Flower offers to a Python script; it says that `flwr run` is to replace it. That one packs an
app, starts a SuperLink in the background that stays after the run, and hands nothing back, so it is for processes.py.
Ray serves the clients from as many processes as there are cores.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import telemetry_off  # noqa: F401  before Flower is imported

# isort: split
import client
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation


class OfTheRun(logging.Filter):
    """Flower's log without what it says every time: that the call is deprecated, and that only the server judges."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING and not any(
            known in record.getMessage().lower() for known in ("deprecated", "federated evaluation will be skipped")
        )


def simulate(main: Callable[[Grid], None], clients: int, device: str = "cpu", cpus: int | None = None) -> None:
    """Call ``main`` with a grid of so many clients; what it raises is raised here.

    Args:
        main: the server.
        clients: how many there are.
        device: of the clients; with "cuda" they share the GPU.
        cpus: processes that serve them, as many as there are cores without it.
    """
    if cpus is None:  # macOS knows no affinity
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        main(grid)

    # Ray's workers import client.py and deqfast from where this process has them.
    own = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [own, os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray asks for it in a warning
    flower = logging.getLogger("flwr")
    quiet = OfTheRun()
    flower.addFilter(quiet)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Tip: In future versions of Ray", FutureWarning)
            run_simulation(
                server,
                client.app,
                clients,
                backend_config={
                    "client_resources": {"num_cpus": 1, "num_gpus": 1 / cpus if device.startswith("cuda") else 0.0},
                    "init_args": {
                        "num_cpus": cpus,
                        "include_dashboard": False,
                        "_node_ip_address": "127.0.0.1",
                        "log_to_driver": False,
                        "logging_level": "ERROR",
                    },
                },
            )
    finally:
        flower.removeFilter(quiet)
