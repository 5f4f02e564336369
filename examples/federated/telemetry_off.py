"""Import this before Flower: it reads the variable once, and would report runs to its makers. Ray likewise."""

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
