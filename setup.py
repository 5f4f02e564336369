"""Builds deqfast: CMake compiles the extension, setuptools packs the Python files (metadata: pyproject.toml).

DEQFAST_SKIP_BUILD=1 leaves the extension out: a pure-Python wheel, made without a compiler. DEQFAST_LOCAL_VERSION=cu128
makes the version 0.1.0+cu128, for an index of one's own.
"""

import os
import runpy
import sys
from pathlib import Path

from setuptools import find_packages, setup

skip_build = os.environ.get("DEQFAST_SKIP_BUILD", "0") not in ("", "0")
local_version = os.environ.get("DEQFAST_LOCAL_VERSION", "")

if not skip_build and {"bdist_wheel", "editable_wheel"} & set(sys.argv):
    runpy.run_path(str(Path(__file__).parent / "cmake" / "build_plan.py"))["announce"]()

setup(
    packages=[*find_packages(include=["deqfast", "deqfast.*"], exclude=["deqfast.kernels*"]), "deqfast.kernels"],
    **({"options": {"egg_info": {"tag_build": f"+{local_version}"}}} if local_version else {}),
    **({} if skip_build else {"cmake_source_dir": "."}),
)
