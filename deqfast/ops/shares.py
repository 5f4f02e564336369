"""Tensors of which several ranks have a part each, as torch.distributed.checkpoint takes them.

A solve that ranks share is saved as the whole that it is: each rank writes its own slice, and on another number of
ranks each reads the slices that make up its new one. DTensor has no uneven shares, nor ranks without one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .layout import Layout
from .shared import Group

_Shape = tuple[int, ...]
_ITERATES = ("x", "x_prev", "saved", "previous")
_SECOND = ("ints", "reals", "history", "scales")  # whose dim 1 counts samples


class Share(Tensor):
    """This rank's slice of a tensor, with the whole's shape; ``local`` begins at ``offset`` in it.

    The three methods in two underscores are those by which torch.distributed.checkpoint asks a tensor for its parts.
    """

    local: Tensor
    offset: _Shape

    @staticmethod
    def __new__(cls, local: Tensor, whole: _Shape, offset: _Shape) -> Share:
        """A slice that begins at ``offset`` of a tensor of shape ``whole``."""
        share: Share = Tensor._make_wrapper_subclass(cls, whole, dtype=local.dtype, device=local.device)
        share.local, share.offset = local, offset
        return share

    def __create_chunk_list__(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata  # noqa: PLC0415 - for checkpoints alone

        # Nothing is no chunk: it would stand where another rank's begins, and be taken for the same.
        if not self.local.numel() and self.numel():
            return []
        return [ChunkStorageMetadata(offsets=torch.Size(self.offset), sizes=self.local.shape)]

    def __create_write_items__(self, fqn: str, _: object) -> list[Any]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties  # noqa: PLC0415 - as above
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType  # noqa: PLC0415

        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: object) -> Tensor:
        return self.local

    def __reduce_ex__(self, protocol: object) -> Any:
        return Share, (self.local, tuple(self.shape), self.offset)

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"Share({tuple(self.local.shape)} at {self.offset} of {tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Copies, which checkpoints that are written in the background make."""
        aten = torch.ops.aten
        if func in (aten.detach.default, aten.clone.default, aten._to_copy.default, aten.alias.default):
            t = args[0]
            return cls(func(t.local, *args[1:], **(kwargs or {})), tuple(t.shape), t.offset)
        if func is aten.new_empty.default:
            t = args[0]
            return cls(torch.empty_like(t.local, **(kwargs or {})), tuple(t.shape), t.offset)
        raise NotImplementedError(f"{func} of a tensor that lies on several ranks: take its .local")


torch.serialization.add_safe_globals([Share])


def local(t: Tensor) -> Tensor:
    """What is here of it."""
    return t.local if isinstance(t, Share) else t


class Cut:
    """How the tensors of a solve are cut into the parts that ranks have of it. Made on every rank at once.

    Args:
        group: the ranks; ``spread``: each has some numbers of every sample, else some samples.
        layout: of this rank's part.
        said: what ranks tell one another besides, ``told`` by each.
        blocks: of scales, in a column that is here.

    Attributes:
        layout: what the layout of the whole is called.
        told: of every rank what it has said.
        shown: where the numbers of a sample are cut.

    Raises:
        ValueError: the parts are no slices of one whole; on every rank.
    """

    def __init__(self, group: Group, layout: Layout, said: dict[str, Any], blocks: int = 0) -> None:
        self.spread, self.rank = group.spread, group.ranks.rank
        leaves = [
            (tuple(leaf.shape[1:]) or (1,), leaf.order if len(leaf.shape) > 1 else (0, 1)) for leaf in layout.leaves
        ]
        self._dims = [len(shape) for shape, _ in leaves]
        every = group.ranks.gather((leaves, layout.B, blocks, said))
        self.told: list[dict[str, Any]] = [t for *_, t in every]
        self._blocks = [b for _, _, b, _ in every]
        self._samples = [b for _, b, _, _ in every]
        if self.spread:
            self._leaves = [_joined([rank[0][i][0] for rank in every]) for i in range(len(leaves))]
            # Of the largest part: one without numbers, or with one along a dim, may be in any order.
            orders = [max((rank[0][i] for rank in every), key=_numbers)[1] for i in range(len(leaves))]
            shapes = [(layout.B, *whole) for whole, _, _ in self._leaves]
            self.layout = layout.described(list(zip(shapes, orders, strict=True)))
            parts = [(dim, [n for n in sizes if n]) for _, dim, sizes in self._leaves]
            whole = all(len(sizes) < 2 for _, sizes in parts)
            self.shown = (
                "of whole samples" if whole else "of parts " + ", ".join(f"{n} along dim {d + 1}" for d, n in parts)
            )
        else:
            self.shown = "of whole samples"
            total = sum(self._samples)
            self.layout = layout.described([((total, *leaf.shape[1:]), leaf.order) for leaf in layout.leaves])

    def of(self, name: str, t: Tensor) -> Tensor:
        """A tensor of this name in canonical form as a part of the whole; as it is where every rank has all of it."""
        kind, _, i = name.partition(".")
        whole = list(t.shape)
        if not self.spread:
            dim = 1 if kind in _SECOND else 0
            sizes = self._samples
        elif kind in _ITERATES or kind == "history":
            numbers, dim, sizes = self._leaves[int(i)]
            begin = 3 if kind == "history" else 1
            whole[begin : begin + self._dims[int(i)]] = numbers
            dim += begin
        elif kind == "scales" and sum(self._blocks):
            dim, sizes = 3, self._blocks
        else:
            return t
        whole[dim] = sum(sizes)
        offset = [0] * len(whole)
        offset[dim] = sum(sizes[: self.rank])
        return Share(t, tuple(whole), tuple(offset))


def _numbers(leaf: tuple[_Shape, _Shape]) -> int:
    return math.prod(leaf[0])


def _joined(shapes: list[_Shape]) -> tuple[_Shape, int, list[int]]:
    """Of what every rank has of a leaf: the whole, the dim along which it is cut, and the sizes there.

    The dim is the one in which parts differ, the first if they are alike. What holds no number is a part of any.
    """
    some = [s for s in shapes if math.prod(s)] or shapes
    differ = {d for s in some for d in range(len(s)) if len(s) == len(some[0]) and s[d] != some[0][d]}
    if len(differ) > 1 or any(len(s) != len(some[0]) for s in some):
        shown = "; ".join(f"rank {r}: {s}" for r, s in enumerate(shapes))
        raise ValueError(
            f"a solve that ranks share is saved where their numbers of a sample are slices along one dim, got {shown}"
        )
    dim = differ.pop() if differ else 0
    sizes = [s[dim] if math.prod(s) else 0 for s in shapes]
    whole = list(some[0])
    whole[dim] = sum(sizes)
    return tuple(whole), dim, sizes
