"""Builds deqfast: CMake compiles the extension, setuptools packs the Python files (metadata: pyproject.toml).

DEQFAST_SKIP_BUILD=1 leaves the extension out: a pure-Python wheel, made without a compiler.
"""

import os

from setuptools import find_packages, setup

skip_build = os.environ.get("DEQFAST_SKIP_BUILD", "0") not in ("", "0")

setup(
    packages=[*find_packages(include=["deqfast", "deqfast.*"], exclude=["deqfast.kernels*"]), "deqfast.kernels"],
    **({} if skip_build else {"cmake_source_dir": "."}),
)
