"""The server's state after a round, in one file that is either the old one or the new one, never half of either."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HEADER = "header"


def save(path: Path, weights: Mapping[str, np.ndarray], history: Sequence[Mapping[str, Any]], options: Any) -> None:
    """Write beside ``path``, then move: whoever is killed meanwhile leaves the file of the round before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"options": dataclasses.asdict(options), "history": list(history)})
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with os.fdopen(handle, "wb") as file:
            arrays: dict[str, Any] = {f"weights/{key}": array for key, array in weights.items()}
            arrays[HEADER] = np.array(header)
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load(path: Path, options: Any) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """Weights and history of the last round; of a run with these options, or it says which one differs."""
    if not path.is_file():
        raise FileNotFoundError(f"nothing to resume from: there is no {path}")
    try:
        # Opened here: np.load leaves a file open that turns out to be no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            header = json.loads(str(stored[HEADER]))
            weights = {key.removeprefix("weights/"): stored[key] for key in stored.files if key != HEADER}
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is no checkpoint of this example: {error}") from error
    for name, now in dataclasses.asdict(options).items():
        then = header["options"].get(name)
        # More rounds than were asked for at first are what a resumed run may want.
        if then != now and name != "rounds":
            raise ValueError(f"{name}: {path} is of a run with {then!r}, this one has {now!r}")
    return weights, header["history"]
