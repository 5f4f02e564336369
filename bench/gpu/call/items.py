"""The child's side: items told of line by line; a lost CUDA context ends the process, and another goes on behind it."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.gpu.call.process import MARK, STICKY, die_with_parent


def tell(**what: Any) -> None:
    sys.__stdout__.write("\n" + MARK + json.dumps(what, default=str) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


class Items:
    """Runs items by name, but for those that ``done`` names; ``synchronize`` raises where an earlier launch failed."""

    def __init__(self, done: Path | None, synchronize: Callable[[], object] = lambda: None) -> None:
        die_with_parent()
        self.done = set(done.read_text().splitlines()) if done else set()
        self.synchronize = synchronize
        self.bad = False

    def run(self, name: str, call: Callable[[], Any], gpu: str | None = None) -> Any:
        """What ``call`` returns, or None; ``gpu``: the key of gpu.json that the value goes to."""
        if name in self.done:
            return None
        tell(begin=name)
        begin = time.perf_counter()
        try:
            value = call()
            self.synchronize()
        except Exception as error:
            self.bad = True
            where = "".join(traceback.format_tb(error.__traceback__)[-3:])
            why = f"{type(error).__name__}: {str(error)[:1500]}"
            lost = self._lost()
            tell(name=name, ended="failed", why=why, where=where, lost=lost, seconds=time.perf_counter() - begin)
            if lost:
                os._exit(STICKY)
            return None
        more: dict[str, Any] = {} if gpu is None else {"gpu": {gpu: value}}
        tell(name=name, ended="ok", value=value, seconds=round(time.perf_counter() - begin, 3), **more)
        return value

    def _lost(self) -> bool:
        """Whether the device answers no more: a sticky error comes back at each wait."""
        try:
            self.synchronize()
        except Exception:
            return True
        return False
