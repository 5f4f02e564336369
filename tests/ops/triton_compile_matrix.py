"""Compile every kernel for two GPUs, with the arguments that a solve launches it with, and print what each one uses.

No GPU is needed: Triton's compiler makes the code, cuobjdump reads what it uses. One JSON object a line.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import deqfast as dq
from deqfast.kernels import anderson, broyden, joint, joint_finish
from deqfast.ops.joint import JointWorkspace, MapOptions, Part
from deqfast.ops.joint_step import JointStep
from deqfast.ops.layout import Layout
from deqfast.ops.triton import Triton
from deqfast.ops.workspace import Stopping

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
F64, F32, BF16, F16, I8 = torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8

# (solver, dtype of the state, its sizes, compute capability)
ONE_PROGRAM = [
    (dq.Anderson(), F32, [4096], 90),
    (dq.Anderson(history_dtype=F32, type=1, mixing=0.5), F32, [4095], 80),
    (dq.Anderson(history_dtype=I8), F32, [4095], 90),
    (dq.Anderson(history_dtype=F16, type=2), F16, [1000], 80),
    (dq.Anderson(m=5), BF16, [63], 90),
    (dq.Anderson(), F64, [4096], 80),
    (dq.Anderson(m=20), F64, [500], 90),
    (dq.Anderson(m=20), F32, [500], 80),
    (dq.Anderson(type=2, history_dtype=I8), F64, [100], 90),
    (dq.Anderson(), F32, [8], 80),
    (dq.Anderson(type=2), F64, [1], 90),
    (dq.Picard(damping=0.5), F32, [100], 90),
    (dq.Broyden(), F32, [8192], 80),
    (dq.Broyden(scale="first_step"), F64, [1001], 90),
]
SHARED = [
    (dq.Anderson(), F32, [100_000], 90),
    (dq.Anderson(type=2, mixing=0.5, history_dtype=F16), F64, [1001, 500], 80),
    (dq.Anderson(m=40, type=1, history_dtype=I8), BF16, [1001, 500], 90),
    (dq.Broyden(), F32, [100_000], 80),
    (dq.Broyden(scale="first_step"), F64, [1001, 500], 90),
]
BALL = {"normalize": True, "ball": "l2", "radius": 1.0}
# (solver, options of the map, centre, what is returned, whether x is accelerated, dtype of the state, sizes of z and x,
# compute capability)
JOINT = [
    (dq.Anderson(m=20), MapOptions((0.8, 0.6)), False, "cost", True, F32, [47_824, 784], 90),
    (dq.Anderson(m=40), MapOptions((0.8, 0.6), **BALL), True, "last", False, F32, [1001, 100], 80),
    (dq.Anderson(m=5), MapOptions(ball="linf", radius=0.1, low=0.0), True, "best", False, F64, [100, 10_001], 90),
    (dq.Anderson(m=5), MapOptions(**BALL), False, "cost", False, BF16, [500, 1], 80),
    (dq.Picard(), MapOptions((1.0, 0.5), low=0.0), False, "best", True, F16, [64, 64], 90),
]


class Launches:
    """Stands in for a kernel: keeps the arguments of its launches."""

    def __init__(self, kernel, found: list) -> None:
        self.launched, self.found = kernel, found

    def __getitem__(self, grid):
        return self.note

    def note(self, *args, **options) -> None:
        self.found.append((self.launched, args, options))


class Gpu:
    """Stands in for Triton's driver: a GPU to compile for, a device for each compute capability."""

    capability = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def launches(solver, dtype, sizes) -> list:
    """Every launch of one step: kernel, arguments, what is compiled in."""
    z0 = tuple(torch.zeros(2, n, dtype=dtype) for n in sizes)
    state = solver.init(z0, backend="reference")
    found = listen()
    step = Triton().bind(state.ws)
    step(list(z0), [t.clone() for t in z0] if solver.uses_previous else None, None, None)
    return found


def joint_launches(solver, options, centered, returns, whole, dtype, sizes) -> list:
    """The same for a joint step on z and x of these sizes."""
    every = [torch.zeros(2, n, dtype=dtype) for n in (sizes[0], *sizes)]
    layout = Layout(every, "every")
    inner = layout if whole else Layout(every[:2], "every")
    core = solver.workspace(inner, Stopping(0.0, keep_best=returns == "best"))
    core.judge_blocks([(1e-3, 0.0, 1.0)] * 3)
    center = torch.zeros(2, sizes[1], dtype=layout.acc) if centered else None
    chosen = [0, 1, 2 if whole else None]
    parts = [Part(i, leaf, chosen[i], center if i == 2 else None) for i, leaf in enumerate(layout.leaves)]
    found = listen()
    step = JointStep(JointWorkspace(core, parts, options, returns, True), Triton())
    for _ in range(2):  # the second makes a column
        step(every, 0.1, torch.zeros(2, dtype=layout.acc))
    return found


def listen() -> list:
    """Where the kernels leave what they are launched with from now on."""
    found: list = []
    for module in (anderson, broyden, joint, joint_finish):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            kernel = getattr(module, name)
            setattr(module, name, Launches(kernel.launched if isinstance(kernel, Launches) else kernel, found))
    return found


def usage(binary: bytes) -> dict[str, int]:
    """Registers and bytes of stack a thread, bytes of local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        dump = subprocess.check_output([CUOBJDUMP, "--dump-resource-usage", file.name], text=True)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump)}
    return {name.lower(): value for name, value in found.items()}


def jobs():
    """What is to be compiled: case, launch, compute capability."""
    for solver, dtype, sizes, capability in ONE_PROGRAM + SHARED:
        for launch in launches(solver, dtype, sizes):
            yield f"{solver} {dtype} {sizes} sm_{capability}", launch, capability
    for solver, options, centered, returns, whole, dtype, sizes, capability in JOINT:
        for launch in joint_launches(solver, options, centered, returns, whole, dtype, sizes):
            yield f"{solver} {options} {returns} {dtype} {sizes} sm_{capability}", launch, capability


def kinds(args: tuple) -> tuple:
    """What arguments are, whatever the numbers."""
    return tuple(kinds(arg) if isinstance(arg, tuple) else getattr(arg, "dtype", type(arg)) for arg in args)


def main(which: int, of: int) -> None:
    """Compile every ``of``-th kernel, and print what each uses."""
    gpu = Gpu()
    driver.set_active(gpu)
    known: set = set()
    for case, (kernel, args, options), capability in jobs():
        key = kernel, capability, str(options), kinds(args)
        if key in known:
            continue
        known.add(key)
        if len(known) % of != which:
            continue
        gpu.capability = capability
        code = kernel.warmup(*args, grid=(1,), **options)
        used = {"shared": code.metadata.shared, **usage(code.asm["cubin"])}
        print(json.dumps({"case": f"{kernel.__name__} {case}", "kernel": kernel.__name__, **used}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
