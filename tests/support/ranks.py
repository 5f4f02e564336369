"""Processes of a test that form a gloo group, and what each of them returned or raised."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()


def run_ranks(path: Path, function: str, size: int = 2, timeout: float = 120, **given: Any) -> list[Any]:
    """What ``module:function(rank, size, **given)`` returned on each of so many ranks, an exception where it raised."""
    (path / "given").write_bytes(pickle.dumps(given))
    root = HERE.parents[2]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RANKS_DIR": str(path), "RANKS_SIZE": str(size)}
    env["PYTHONPATH"] = os.pathsep.join([*(p for p in sys.path if p), str(root)])
    processes = [
        subprocess.Popen([sys.executable, str(HERE), function, str(rank)], env=env, stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    found: list[Any] = []
    try:
        for rank, process in enumerate(processes):
            _, told = process.communicate(timeout=timeout)
            result = path / f"rank{rank}"
            found.append(
                pickle.loads(result.read_bytes()) if result.exists() else RuntimeError(f"died: {told[-2000:]}")
            )
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return found


def all_well(found: list[Any]) -> list[Any]:
    """What the ranks returned; what one of them raised, in its own words, where one did."""
    errors = [result for result in found if isinstance(result, Exception)]
    errors.sort(key=lambda error: "peer" in str(error))  # those that lost one come last
    if errors:
        raise errors[0]
    return found


def _main() -> None:
    import datetime
    import importlib
    import traceback

    import torch.distributed as dist

    function, rank = sys.argv[1], int(sys.argv[2])
    path, size = Path(os.environ["RANKS_DIR"]), int(os.environ["RANKS_SIZE"])
    module, _, name = function.partition(":")
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=size, timeout=limit)
    given = pickle.loads((path / "given").read_bytes())
    try:
        result = getattr(importlib.import_module(module), name)(rank, size, **given)
    except Exception as error:
        if hasattr(error, "add_note"):
            error.add_note(traceback.format_exc())
        result = error
    scratch = path / f"rank{rank}.tmp"
    scratch.write_bytes(pickle.dumps(result))
    scratch.rename(path / f"rank{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    _main()
