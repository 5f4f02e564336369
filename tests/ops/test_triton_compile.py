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
    *("gather_kernel", "apply_kernel"),
    *("square_kernel", "map_kernel", "norms_kernel", "record_kernel", "copy_kernel"),
}
SHARED_MEMORY = 99 << 10  # bytes that every GPU of the last years grants a block
# ptxas keeps a few bytes aside, around the slow path of a float64 division or for what finds no register; spilling a
# tile takes hundreds.
STACK = 32
# Where every register is in use, what else is kept aside, in bytes: kernel, what its case says.
KEPT_ASIDE = {
    ("sample_kernel", "Anderson(m=20,", "torch.float32 [500] sm_80"): 80,  # by Triton 3.6
    ("decide_kernel", "Anderson(m=20,", "torch.float32 [47824, 784] sm_90"): 40,  # by Triton 3.6
    ("sample_kernel", "torch.int8", "torch.float32 [4095] sm_90"): 48,
}
PROCESSES = 2


@pytest.mark.triton
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_kernel_compiles_without_spilling(tmp_path):
    # Triton's interpreter would replace what is to be compiled, and its cache would hide it.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    cases = []
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(MATRIX), str(which), str(PROCESSES)],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for which in range(PROCESSES)
    ]  # fmt: skip
    for process in running:
        output, errors = process.communicate()
        assert process.returncode == 0, output[-2000:] + errors[-4000:]
        cases += [json.loads(line) for line in output.splitlines()]
    assert {case["kernel"] for case in cases} == KERNELS
    assert not [case for case in cases if case["stack"] > stack_of(case)]
    assert not [case for case in cases if case["local"] or case["shared"] > SHARED_MEMORY]


def stack_of(case: dict) -> int:
    """Bytes that the case may use."""
    return max([STACK, *(size for words, size in KEPT_ASIDE.items() if all(word in case["case"] for word in words))])
