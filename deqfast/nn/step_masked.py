"""``StepMasked``: one weight, and a mask of its own for every step of a model of shared weights."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..options import check_choice, check_fraction, check_int

_TURNS = 5  # of each way, when "auto" measures


class StepMasked(nn.Module):
    """A layer whose weight is shared between steps, each of which sees a part of it.

    ::

        layer = dq.nn.StepMasked(torch.nn.Linear(64, 64), masks=8, density=0.25)
        for k in range(8):
            z = torch.tanh(layer(z, k) + x)

    Step k computes with ``weight * masks[k]``, whole bias. Gradients reach the weights that its mask keeps, no others.
    The masks are distinct (unless density keeps every weight) and each keeps ``round(density * weight.numel())``
    weights, 1 at least.

    Args:
        module: ``nn.Linear`` or ``nn.Conv2d``; it is held as ``module``, its parameters are trained in place.
        masks: K, how many.
        density: which part of the weight a mask keeps, in (0, 1].
        learn: "fixed": drawn once. "magnitude": drawn, until ``update_masks()`` keeps what has been important to each
            step: |weight| times the root of the summed squared gradients that the step gave to its masked weight, kept
            or not, in training mode since the last update. "scores": the largest of ``scores``, a parameter
            (K, *weight.shape) that is learned by straight-through gradients: each score has the gradient that its entry
            of the mask would have, kept or not.
        storage: how a ``Linear`` multiplies in evaluation mode where no gradient is asked for. "dense": by the masked
            weight, made anew. "sparse": by ``torch.sparse_csr`` matrices, made once a step and again when weight or
            masks change. "auto": by matrices that are kept likewise, sparse or dense, whichever is faster: measured
            once for each device, dtype and power of two of rows (docs/masks.md has what was found). Under autocast, in
            training and for ``Conv2d`` all are dense, made anew.
        generator: where masks and scores are drawn from; default torch's own on the CPU. The same seed gives the same
            masks on every device if it is a generator of the CPU. Not the seed that the weights were just drawn with:
            masks made of the same random numbers keep the largest of them.

    Attributes:
        masks: bool (K, *weight.shape), a buffer.

    Masks follow ``scores`` through optimisers and whatever counts a version of a tensor, which ``.data`` does not: call
    ``update_masks()`` after that.

    Raises:
        TypeError, ValueError: another module, or a value that an argument cannot have.
    """

    masks: Tensor
    importance: Tensor

    def __init__(
        self,
        module: nn.Module,
        masks: int,
        density: float = 0.25,
        learn: str = "fixed",
        storage: str = "dense",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            raise TypeError(f"module must be an nn.Linear or nn.Conv2d, got {type(module).__name__}")
        if nn.parameter.is_lazy(module.weight):
            raise TypeError(f"module must have its weight, got a {type(module).__name__} that has seen no input")
        self.count, self.density = check_int("masks", masks), check_fraction("density", density)
        check_choice("learn", learn, ("fixed", "magnitude", "scores"))
        check_choice("storage", storage, ("dense", "sparse", "auto"))
        if storage == "sparse" and not isinstance(module, nn.Linear):
            raise ValueError('storage="sparse" is for nn.Linear; an nn.Conv2d is dense')
        self.module, self.learn, self.storage = module, learn, storage
        weight = module.weight
        shape, n = (self.count, *weight.shape), weight.numel()
        self.kept = max(1, round(self.density * n))
        # There are n masks at least, unless all is kept.
        if self.count > n > self.kept and self.count > math.comb(n, self.kept):
            raise ValueError(
                f"masks={masks} cannot be distinct: there are {math.comb(n, self.kept)} that keep {self.kept} of {n} "
                "weights"
            )
        drawn = torch.rand(shape, generator=generator, device=generator.device if generator else "cpu")
        self.register_buffer("masks", _largest(drawn.flatten(1), self.kept).view(shape).to(weight.device))
        if learn == "magnitude":
            self.register_buffer("importance", torch.zeros(shape, dtype=weight.dtype, device=weight.device))
        if learn == "scores":
            self.scores = nn.Parameter(drawn.to(weight.device, weight.dtype))
        self._made: dict[tuple[int, torch.layout], tuple[Any, Tensor]] = {}
        self._faster: dict[tuple[torch.device, torch.dtype, int], torch.layout] = {}
        self._scores_seen: Any = None
        self._scores_hooked: Any = None

    def forward(self, x: Tensor, step: int) -> Tensor:
        """The layer with the weights of one step.

        Args:
            x: (..., in_features), or (B, in_channels, H, W) for a ``Conv2d``.
            step: from 0 to K - 1.

        Returns:
            (..., out_features), or (B, out_channels, H', W').

        Raises:
            IndexError: there is no mask for this step.
        """
        step = self._checked(step)
        self._follow_scores()
        if self._may_keep(x):
            layout = torch.sparse_csr if self.storage == "sparse" else self._faster_layout(x, step)
            return self._kept(layout, x, step)
        return self._dense(x, step)

    @torch.no_grad()
    def update_masks(self) -> None:
        """Make the masks anew, from what has been important (and begin to sum again) or from the scores.

        A step that has given no gradient keeps its mask.

        Raises:
            RuntimeError: with ``learn="fixed"``.
        """
        if self.learn == "fixed":
            raise RuntimeError('masks with learn="fixed" stay as they are; choose learn="magnitude" or "scores"')
        if self.learn == "scores":
            wanted = self.scores.detach().flatten(1)
            self._scores_seen = _version(self.scores)
        else:
            wanted = self.importance.sqrt().mul_(self.module.weight.abs()).flatten(1)
            silent = ~wanted.any(1, keepdim=True)
            wanted = torch.where(silent, self.masks.flatten(1).to(wanted.dtype), wanted)
            self.importance.zero_()
        masks = _largest(wanted, self.kept).view_as(self.masks)
        if not torch.equal(masks, self.masks):  # a graph that holds them stays valid
            self.masks.copy_(masks)

    def multiply_adds(self, step: int, input_shape: Sequence[int] | None = None) -> int:
        """How many multiply-adds a step needs if it skips what its mask drops.

        Args:
            step: from 0 to K - 1.
            input_shape: of x; default: of one row of a ``Linear``, of one output position of a ``Conv2d``.
        """
        step = self._checked(step)
        self._follow_scores()
        kept = int(self.masks[step].count_nonzero())
        if input_shape is None:
            return kept
        if isinstance(self.module, nn.Linear):
            return kept * math.prod(input_shape[:-1])
        weight = self.module.weight.detach().to("meta")
        out = self.module._conv_forward(torch.empty(*input_shape, dtype=weight.dtype, device="meta"), weight, None)
        return kept * (out.numel() // self.module.out_channels)

    def extra_repr(self) -> str:
        """The options."""
        options = f"masks={self.count}, density={self.density:g}"
        return f"{options}, learn={self.learn!r}, storage={self.storage!r}"

    def train(self, mode: bool = True) -> StepMasked:
        """``nn.Module.train``; matrices that an evaluation has kept are given up."""
        if mode:
            self._made = {}
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": {}, "_faster": {}, "_scores_seen": None, "_scores_hooked": None}

    def _checked(self, step: int) -> int:
        if isinstance(step, bool) or not isinstance(step, (int, Integral)):
            raise TypeError(f"step must be an int, got {type(step).__name__}")
        if not 0 <= step < self.count:
            raise IndexError(f"step {step} is beyond the bank of {self.count} masks")
        return int(step)

    def _follow_scores(self) -> None:
        # All at once: the masks are one tensor, of which autograd may hold a part from the next step on.
        if self.learn != "scores":
            return
        if self._scores_hooked is not self.scores and self.scores.requires_grad and self.scores.is_leaf:
            self.scores.register_post_accumulate_grad_hook(self._forget_scores)
            self._scores_hooked = self.scores
        if self._scores_seen != _version(self.scores):
            self.update_masks()

    def _forget_scores(self, _: Tensor) -> None:
        # A fused optimiser, which may come now, changes them without counting a version.
        self._scores_seen = None

    def _masked(self, step: int) -> Tensor:
        weight, mask = self.module.weight, self.masks[step]
        if self.learn == "scores":
            through = mask.to(weight.dtype) + (self.scores[step] - self.scores[step].detach())
            return weight * through if torch.is_grad_enabled() else weight * mask
        masked = weight * mask
        if self.learn == "magnitude" and self.training and masked.requires_grad:
            masked.register_hook(partial(self._count, step))
        return masked

    @torch.no_grad()
    def _count(self, step: int, g: Tensor) -> None:
        self.importance[step] += g.detach().square()

    def _dense(self, x: Tensor, step: int) -> Tensor:
        weight, bias = self._masked(step), self.module.bias
        if isinstance(self.module, nn.Linear):
            return functional.linear(x, weight, bias)
        return self.module._conv_forward(x, weight, bias)

    def _may_keep(self, x: Tensor) -> bool:
        if self.storage == "dense" or self.training or not isinstance(self.module, nn.Linear):
            return False
        wanted = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        if wanted:  # an optimiser may come, and a fused one counts no version
            self._made = {}
        return not wanted and not torch.is_autocast_enabled(x.device.type)

    def _kept(self, layout: torch.layout, x: Tensor, step: int) -> Tensor:
        """The product with a matrix that was made before, unless weight or masks have changed."""
        weight, bias = self._weight(layout, step), self.module.bias
        if layout == torch.strided:
            return functional.linear(x, weight, bias)
        rows = x.reshape(-1, x.shape[-1])
        y = (weight @ rows.t()).t()
        y = y if bias is None else y + bias
        return y.reshape(*x.shape[:-1], y.shape[-1])

    @torch.no_grad()
    def _weight(self, layout: torch.layout, step: int) -> Tensor:
        weight = self.module.weight
        key = (_version(weight), _version(self.masks))
        known = self._made.get((step, layout))
        if known is None or known[0] != key:
            made = weight * self.masks[step]
            if layout == torch.sparse_csr:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
                    made = made.to_sparse_csr()
            known = self._made[step, layout] = (key, made)
        return known[1]

    def _faster_layout(self, x: Tensor, step: int) -> torch.layout:
        rows = x.numel() // max(1, x.shape[-1])
        key = (x.device, x.dtype, rows.bit_length())
        if key not in self._faster:
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return torch.strided
            sparse, dense = (partial(self._kept, layout, x, step) for layout in (torch.sparse_csr, torch.strided))
            try:
                faster = _is_faster(sparse, dense, x.device)
            except RuntimeError:  # no sparse product for this dtype or device
                faster = False
            self._faster[key] = torch.sparse_csr if faster else torch.strided
            self._made.pop((step, torch.strided if faster else torch.sparse_csr), None)
        return self._faster[key]


def _is_faster(first: Callable[[], Tensor], second: Callable[[], Tensor], device: torch.device) -> bool:
    """Whether the first takes less time, in turns, by the best of each; once before the clock runs."""
    best = [math.inf, math.inf]
    for turn in range(_TURNS + 1):
        for i, way in enumerate((first, second)):
            _wait(device)
            begin = time.perf_counter()
            way()
            _wait(device)
            if turn:
                best[i] = min(best[i], time.perf_counter() - begin)
    return best[0] < best[1]


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _version(t: Tensor) -> tuple[Any, ...]:
    """What changes when a tensor's values do."""
    return (t.data_ptr(), t.dtype, t.device, None if t.is_inference() else t._version)


def _largest(values: Tensor, kept: int) -> Tensor:
    """Masks (K, n) of the largest of each row of values (K, n), no two alike."""
    masks = torch.zeros_like(values, dtype=torch.bool)
    masks.scatter_(1, values.topk(kept, 1).indices, True)
    if kept < values.shape[1] and torch.unique(masks, dim=0).shape[0] < masks.shape[0]:
        for k in range(1, len(masks)):
            _set_apart(masks[: k + 1], values[k])
    return masks


def _set_apart(masks: Tensor, values: Tensor) -> None:
    """Change the last mask to one that is none of the others: the first that is not, in the order of ``values``."""
    others, mask = masks[:-1], masks[-1]
    if not (others == mask).all(1).any():
        return
    order = values.argsort(descending=True, stable=True).tolist()
    for chosen in combinations(order, int(mask.count_nonzero())):
        mask.zero_()
        mask[list(chosen)] = True
        if not (others == mask).all(1).any():
            return
