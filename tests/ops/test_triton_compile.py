"""Triton's compiler takes every kernel, for two generations of GPU, without spilling registers. No GPU is needed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MATRIX = Path(__file__).with_name("triton_compile_matrix.py")
KERNELS = {
    *("sample_kernel", "reduce_kernel", "decide_kernel", "mix_kernel", "finish_kernel"),
    *("gather_kernel", "chain_kernel", "recur_kernel", "apply_kernel"),
    *("square_kernel", "map_kernel", "norms_kernel", "record_kernel", "copy_kernel"),
}
SHARED_MEMORY = 99 << 10  # bytes that every GPU of the last years grants a block
# ptxas keeps a few bytes aside around the slow path of a float64 division; spilling a tile takes hundreds.
STACK = 16


@pytest.mark.triton
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_kernel_compiles_without_spilling(tmp_path):
    # Triton's interpreter would replace what is to be compiled, and its cache would hide it.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-W", "error", str(MATRIX)], env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert {case["kernel"] for case in cases} == KERNELS
    assert not [case for case in cases if case["stack"] > STACK or case["local"] or case["shared"] > SHARED_MEMORY]
