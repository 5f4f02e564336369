"""The example's folder is where its scripts look for one another, so it is put on the path, last."""

import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "examples" / "federated"
sys.path.append(str(FOLDER))
