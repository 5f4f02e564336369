"""The cases of tests/device/device_smoke.py, one item each: `python -m bench.gpu.call.smoke DEVICE BACKEND`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import deqfast as dq
from bench.gpu.call.items import Items
from deqfast import ops

sys.path.append(str(Path(__file__).resolve().parents[3] / "tests" / "device"))
import device_smoke as smoke  # type: ignore[import-not-found]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.call.smoke", description=__doc__)
    parser.add_argument("device")
    parser.add_argument("backend")
    parser.add_argument("--done", type=Path)
    options = parser.parse_args()
    device, backend = torch.device(options.device), options.backend
    items = Items(options.done, torch.cuda.synchronize if device.type == "cuda" else lambda: None)

    def serves() -> None:
        why = ops.why_not(backend, device)
        if why is not None:
            raise RuntimeError(f"{backend} does not serve {device}: {why}")

    items.run("serves", serves)
    if ops.why_not(backend, device) is not None:
        return 1
    for solver, dtype, shapes in smoke.cases():
        name = f"{solver} {dtype} {shapes}"

        def step(solver=solver, dtype=dtype, shapes=shapes, name=name) -> None:  # type: ignore[no-untyped-def]
            generator = torch.Generator().manual_seed(0)
            drive = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
            # The reference on the CPU: thousands of small launches are not what is looked at.
            expected = [t.to(device) for t in smoke.solve(solver, drive, "reference")]
            got = smoke.solve(solver, [t.to(device) for t in drive], backend)
            smoke.check(name, got, expected, smoke.ERROR[dtype])

        items.run(name, step)
    halved = ((smoke.anderson(), 37), (smoke.anderson(type=2), 16_389), (dq.Broyden(memory=3), 65_539))
    for solver, N in halved if backend == "native" else ():
        name = f"halves of {solver}, N = {N}"

        def halves(solver=solver, N=N, name=name) -> None:  # type: ignore[no-untyped-def]
            drive = [torch.randn(1, N, generator=torch.Generator().manual_seed(0))]
            expected = [t.to(device) for t in smoke.solve(solver, drive, "reference")]
            got = smoke.solve(solver, [t.to(device) for t in drive], "native", True)
            smoke.check(name, got, expected, smoke.ERROR[torch.float32])

        items.run(name, halves)
    for dtype, sizes, settings in smoke.joint_cases():
        name = f"joint {dtype} {sizes} {settings}"

        def solve(dtype=dtype, sizes=sizes, settings=settings, name=name) -> None:  # type: ignore[no-untyped-def]
            expected = smoke.joint(dtype, sizes, settings, device, "reference")
            smoke.check(name, smoke.joint(dtype, sizes, settings, device, backend), expected, smoke.ERROR[dtype])

        items.run(name, solve)

    def compacted() -> None:
        p = torch.linspace(0.1, 0.9, 20)[:, None].to(device)
        z0 = torch.zeros(20, 33, device=device)
        z = dq.fixed_point(lambda z, p: p * z + 1, z0, (p,), backend=backend, compact=True).z
        smoke.check("compacted", [z], [(1 / (1 - p)).expand(20, 33)], 2e-3)

    items.run("compacted", compacted)
    return int(items.bad)


if __name__ == "__main__":
    sys.exit(main())
