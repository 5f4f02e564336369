"""Installs a wheel of a folder into an empty environment and tests it there, away from the tree: ``make try-wheel``.

torch comes first: the one that is named, or what another environment has (``--torch-from``, a site-packages folder).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Steps, the binding, gradients, and what an import does; a minute.
PART = ["tests/ops/test_anderson.py", "tests/ops/test_broyden.py", "tests/ops/test_bindings.py", "tests/gradients"]
PART += ["tests/repo/test_import_time.py"]
# The package is where it was installed, it has its module, and importing it makes no CUDA context.
CHECK = """
import pathlib, sys, torch, deqfast
from deqfast.ops.native import extension
place = pathlib.Path(deqfast.__file__)
assert place.is_relative_to(sys.prefix), f"expected deqfast in {sys.prefix}, got {place}"
assert extension._C is not None, extension._IMPORT_ERROR
assert not torch.cuda.is_initialized(), "importing deqfast made a CUDA context"
print(f"deqfast {deqfast.__version__}, torch {torch.__version__}, {extension._C.build_info()}")
"""


def run(*command: str | Path, cwd: Path) -> None:
    """The command; its failure ends the script. PYTHONPATH goes: the tree must not be found."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.setdefault("OMP_WAIT_POLICY", "passive")  # as `make test` runs them
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(str(part) for part in command)[:200]}: exit status {done.returncode}")


def environment_with(torch: str, torch_from: Path | None, folder: Path) -> Path:
    """An environment with torch and what the tests need; its Python."""
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    if torch_from:
        if not (torch_from / "torch").is_dir():
            raise SystemExit(f"--torch-from: expected a folder with torch, got {torch_from}")
        (site,) = folder.glob("lib/python3*/site-packages")
        (site / "torch-from.pth").write_text(f"{torch_from.resolve()}\n")
    else:
        run(*pip, torch, "numpy", cwd=folder.parent)
    run(*pip, "pytest>=8", "hypothesis>=6.100", cwd=folder.parent)
    return python


def main(arguments: Sequence[str] | None = None) -> None:
    """Install, say what is active, run a part of the tests."""
    parser = argparse.ArgumentParser(prog="python .ci/try_wheel.py", description=(__doc__ or "").split(":")[0] + ".")
    parser.add_argument("--wheels", type=Path, default=ROOT / "dist")
    parser.add_argument("--torch", default="torch", help="what pip installs")
    parser.add_argument(
        "--torch-from", type=Path, help="a site-packages folder that has torch; nothing is installed there"
    )
    parser.add_argument("tests", nargs="*", default=PART)
    options = parser.parse_args(arguments)
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        python = environment_with(options.torch, options.torch_from, place / "environment")
        pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--ignore-installed")
        run(*pip, "--no-index", "--no-deps", "--find-links", options.wheels.resolve(), f"deqfast=={version}", cwd=place)
        for name in ("tests", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
            copy(ROOT / name, place / name)
        run(python, "-m", "deqfast.info", cwd=place)
        run(python, "-c", CHECK, cwd=place)
        run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not triton", *options.tests, cwd=place)


if __name__ == "__main__":
    main()
