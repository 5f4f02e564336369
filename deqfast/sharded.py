"""States that are tensors of a device mesh: DTensor, and what is one by duck type.

Such a tensor has ``to_local``, ``placements`` and ``device_mesh``. A dim that counts samples may be sharded: each rank
then solves for its own samples, without traffic. Where another dim is, every sample is spread over the ranks of that
mesh dim, and they share the solve. A replicated state is solved on every rank alike. f is given, and gives, tensors of
the mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from .called import Called


def is_sharded(z0: Any) -> bool:
    """Whether some tensor of the state is one of a mesh."""
    if z0.__class__ is Tensor:
        return False
    return any(_on_mesh(t) for t in pytree.tree_leaves(z0))


def _on_mesh(t: object) -> bool:
    return isinstance(t, Tensor) and hasattr(t, "to_local") and hasattr(t, "placements") and hasattr(t, "device_mesh")


class Placed:
    """A state on a mesh, and the local one that is solved for.

    Args:
        z0: tree of tensors of one mesh.
        batch_dims: how many leading dims count samples.
        group: what the caller gave for one.
        stop: as in ``fixed_point``.

    Attributes:
        group: the ranks over which samples are spread, None where none is.

    Raises:
        TypeError: some tensors are of a mesh and some are not, or of several.
        ValueError: a placement that is no state's, samples spread over several mesh dims, or over another group.
    """

    def __init__(self, z0: Any, batch_dims: int, group: Any, stop: str) -> None:
        leaves, self._spec = pytree.tree_flatten(z0)
        others = [type(t).__name__ for t in leaves if not _on_mesh(t)]
        if others:
            raise TypeError(f"z0 must hold tensors of a mesh alone, or none, got a {others[0]} beside one")
        self._like = leaves
        self._mesh = leaves[0].device_mesh
        if any(t.device_mesh != self._mesh for t in leaves):
            raise TypeError("tensors of z0 must be of one mesh, got several")
        across = {dim for t in leaves for dim in self._spread_over(t, batch_dims)}
        if len(across) > 1:
            raise ValueError(
                f"z0 spreads samples over {len(across)} dims of its mesh: flatten them into one, or shard what counts "
                "samples by all but one"
            )
        for t in leaves:
            if across and not set(self._spread_over(t, batch_dims)):
                raise ValueError("tensors of z0 must all be sharded beyond what counts samples, or none of them")
        if across and stop == "consensus":
            raise ValueError('z0 spreads samples over ranks, which stop together anyway: leave out stop="consensus"')
        self.group = self._mesh.get_group(across.pop()) if across else None
        if group is not None:
            raise ValueError("group is told by the mesh of z0 and its placements: leave it out")

    def _spread_over(self, t: Any, batch_dims: int) -> list[int]:
        """Dims of the mesh over which samples of this tensor are spread."""
        found = []
        for dim, placement in enumerate(t.placements):
            if placement.is_partial():
                raise ValueError(f"z0 must be sharded or replicated, got {placement}: redistribute it")
            if placement.is_shard() and placement.dim % max(1, t.dim()) >= batch_dims and self._mesh.size(dim) > 1:
                found.append(dim)
        return found

    def local(self, tree: Any) -> Any:
        """The part of a tree like z0 that is here; gradients go through."""
        leaves, spec = pytree.tree_flatten(tree)
        return pytree.tree_unflatten([self._here(t, i) for i, t in enumerate(leaves)], spec)

    def _here(self, t: Any, i: int) -> Any:
        if not _on_mesh(t) or i >= len(self._like):
            return t  # which is refused where f's output is looked at
        like = self._like[i]
        if tuple(t.placements) != tuple(like.placements):
            t = t.redistribute(self._mesh, like.placements)
        return t.to_local()

    def of_mesh(self, tree: Any) -> Any:
        """The tree of mesh tensors with these local parts; gradients go through."""
        pairs = zip(pytree.tree_leaves(tree), self._like, strict=True)
        return pytree.tree_unflatten([self._made(t, like) for t, like in pairs], self._spec)

    def _made(self, t: Tensor, like: Any) -> Any:
        known = {"shape": like.shape, "stride": like.stride()} if _is_dtensor(like) else {}
        return type(like).from_local(t, self._mesh, like.placements, **known)


class LocalMap:
    """A map of mesh tensors as one of their local parts."""

    def __init__(self, f: Callable[..., Any], placed: Placed) -> None:
        self._f, self._placed = f, placed

    def __call__(self, z: Any, *args: Any) -> Any:
        """The local part of f."""
        return self._placed.local(self._f(self._placed.of_mesh(z), *args))

    def hold(self) -> None:
        """What follows are evaluations for a derivative."""
        if isinstance(self._f, Called):
            self._f.hold()


def _is_dtensor(t: object) -> bool:
    from torch.distributed.tensor import DTensor

    return type(t) is DTensor
