"""deepinv: plug-and-play proximal gradient on blurred images, and the gradient that trains its denoiser."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import deqfast as dq
from adoption.rows import Passes, Record, Row, apart, in_turns

SIZE, IMAGES = 32, 4
NOISE = 0.02
THRESHOLD = 1e-5
LIMIT = 1000
STEPS = 800  # unrolled


def images(count: int, generator: torch.Generator) -> Tensor:
    """Rectangles on a grey ground."""
    x = torch.full((count, 1, SIZE, SIZE), 0.2)
    for image in x:
        for _ in range(4):
            left, top, width, height = (int(torch.randint(2, SIZE // 2, (1,), generator=generator)) for _ in range(4))
            image[0, top : top + height, left : left + width] = float(torch.rand(1, generator=generator))
    return x


def trained(deepinv: Any) -> Any:
    """A small DnCNN; seconds of training, made less sharp, so that plain iteration ends too."""

    class Careful(deepinv.models.Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.net = deepinv.models.DnCNN(1, 1, depth=4, nf=12, pretrained=None)
            self.evaluations = 0

        def forward(self, x: Tensor, sigma: Any = None, **_: Any) -> Tensor:
            self.evaluations += 1
            half = 0.5 * (x + self.net(x))
            found: Tensor = Passes.apply(0.95 * half + 0.05 * half.mean((-2, -1), keepdim=True))
            return found

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    denoiser = Careful()
    for layer in [module for module in denoiser.net.modules() if isinstance(module, torch.nn.Conv2d)]:
        torch.nn.utils.parametrizations.spectral_norm(layer)
    optimiser = torch.optim.Adam(denoiser.parameters(), 2e-3)
    for _ in range(150):
        clean = images(8, generator)
        noisy = clean + 0.05 * torch.randn(clean.shape, generator=generator)
        optimiser.zero_grad()
        torch.nn.functional.mse_loss(denoiser.net(noisy), clean).backward()
        optimiser.step()
    denoiser.eval()  # or every evaluation would move the norms
    return denoiser


class Steps(torch.nn.Module):
    """``deepinv.optim.FixedPoint``'s place, taken by ``dq.fixed_point``."""

    def __init__(self, own: Any, **options: Any) -> None:
        super().__init__()
        self.own, self.options = own, options
        self.iterator = own.iterator

    def f(self, x: Tensor, y: Tensor, physics: Any) -> Tensor:
        found: Tensor = self.own.single_iteration({"est": (x,)}, 0, y, physics)["est"][0]
        return found

    def forward(self, y: Tensor, physics: Any, init: Any = None, **_: Any) -> tuple[dict[str, Any], None]:
        start = self.own.init_iterate_fn(y, physics, init, cost_fn=None)
        solution = dq.fixed_point(
            lambda x: self.f(x, y, physics), start["est"][0], max_iter=LIMIT, throw=True, **self.options
        )
        return {"est": (solution.z,), "cost": None}, None


@dataclass(frozen=True)
class Task:
    """Four blurred images, and a denoiser to plug in."""

    deepinv: Any
    denoiser: Any
    physics: Any
    clean: Tensor
    y: Tensor

    def algorithm(self, threshold: float = THRESHOLD, **options: Any) -> Any:
        optim = self.deepinv.optim
        common = {"max_iter": LIMIT, "thres_conv": threshold, "early_stop": True}
        prior = optim.PnP(denoiser=self.denoiser)
        return optim.PGD(optim.L2(), prior, stepsize=1.0, sigma_denoiser=0.05, **{**common, **options})

    def ours(self, threshold: float = THRESHOLD, **options: Any) -> Any:
        found = self.algorithm(threshold)
        found.fixed_point = Steps(found.fixed_point, rtol=threshold, **options)
        return found

    def count(self, algorithm: Any) -> tuple[Tensor, int]:
        before = self.denoiser.evaluations
        return algorithm(self.y, self.physics), self.denoiser.evaluations - before

    def gradient(self, algorithm: Any) -> tuple[Tensor, int, int]:
        """Of the loss by the denoiser's parameters; evaluations, and passes back through the denoiser."""
        self.denoiser.zero_grad()
        Passes.count = 0
        x, evaluations = self.count(algorithm)
        torch.nn.functional.mse_loss(x, self.clean).backward()
        flat = torch.cat([p.grad.flatten() for p in self.denoiser.parameters() if p.grad is not None])
        return flat, evaluations, Passes.count


@pytest.fixture(scope="module")
def tasks() -> dict[torch.dtype, Task]:
    pytest.importorskip("torchvision" if loads() else "deepinv")
    deepinv = pytest.importorskip("deepinv")
    generator = torch.Generator().manual_seed(1)
    kernel = deepinv.physics.blur.gaussian_blur(sigma=(1.0, 1.0))
    denoiser = trained(deepinv)
    clean = images(IMAGES, generator)
    noise = NOISE * torch.randn(clean.shape, generator=generator)
    found = {}
    for dtype in (torch.float32, torch.float64):
        physics = deepinv.physics.Blur(filter=kernel.to(dtype), padding="circular")
        truth = clean.to(dtype)
        model = copy.deepcopy(denoiser).to(dtype)
        found[dtype] = Task(deepinv, model, physics, truth, physics.A(truth) + noise.to(dtype))
    return found


def loads() -> bool:
    """deepinv imports torchvision, whose compiled part does not load beside a CPU build of torch: two names will do."""
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
    return True


_KEPT: list[Any] = []  # a library's names go with it


@pytest.mark.parametrize("own", ["plain iteration", "Anderson, its defaults", "Anderson, m=5 eps=1e-4"])
def test_reconstruction(own: str, tasks: dict[torch.dtype, Task], record: Record) -> None:
    task, exact = tasks[torch.float32], tasks[torch.float64]
    options: dict[str, Any] = {"plain iteration": {}, "Anderson, its defaults": {"anderson_acceleration": True}}.get(
        own, {"anderson_acceleration": task.deepinv.optim.AndersonAccelerationConfig(5, 1.0, 1e-4)}
    )
    truth = exact.ours(1e-10)(exact.y, exact.physics)
    theirs, mine = task.algorithm(**options), task.ours(backward="none")
    (x, evaluations), (z, fewer) = task.count(theirs), task.count(mine)
    far, near = apart(truth, x.double()), apart(truth, z.double())
    record.add(
        Row(
            package="deepinv",
            problem="plug-and-play proximal gradient, 4 blurred images, 1e-5",
            own=own,
            evaluations=(evaluations, fewer),
            ratio=in_turns(lambda: task.count(theirs), lambda: task.count(mine), budget=6.0),
            difference=apart(x, z),
            within=2e-2,
            note=f"from the exact solution: {far:.1e} own, {near:.1e} deqfast's",
        )
    )
    assert near <= 1e-3
    assert near <= far
    assert fewer < evaluations


@pytest.fixture(scope="module")
def unrolled(tasks: dict[torch.dtype, Task]) -> Tensor:
    """The gradient through every one of many steps."""
    task = tasks[torch.float64]
    return task.gradient(task.algorithm(max_iter=STEPS, early_stop=False, unfold=True))[0]


@pytest.mark.parametrize("limit", [50, LIMIT])
def test_training_gradient(limit: int, tasks: dict[torch.dtype, Task], unrolled: Tensor, record: Record) -> None:
    """50 is deepinv's default."""
    task, threshold = tasks[torch.float64], 1e-8
    theirs = task.algorithm(threshold, DEQ=task.deepinv.optim.DEQConfig(max_iter_backward=limit))
    mine = task.ours(threshold, backward=dq.Implicit(rtol=threshold))
    mine.unfold = True  # no torch.no_grad() around the solve
    own, ours = task.gradient(theirs), task.gradient(mine)
    far, near = (float((found[0] - unrolled).norm() / unrolled.norm()) for found in (own, ours))
    record.add(
        Row(
            package="deepinv",
            problem="gradient by the denoiser's parameters, 1e-8",
            own=f"DEQ mode, plain iteration, {limit} backward at most",
            evaluations=(own[1] + own[2], ours[1] + ours[2]),
            ratio=in_turns(lambda: task.gradient(theirs), lambda: task.gradient(mine), budget=6.0, least=3),
            difference=near,
            within=1e-4,
            solved=(far <= 1e-4, near <= 1e-4),
            note=f"evaluations and vjps together; from {STEPS} unrolled steps: {far:.1e} own, {near:.1e} deqfast's",
        )
    )
    assert near <= 1e-4
