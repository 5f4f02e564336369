"""Everything that wants a GPU, in one go: `make gpu`, or `python .ci/gpu.py --out FOLDER`; see bench/gpu/call."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.gpu.call.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
