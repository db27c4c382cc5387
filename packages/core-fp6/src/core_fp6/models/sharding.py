"""The part of a weight that a rank holds, where tensor parallelism has cut its columns.

A cut need not fall between groups: a rank then holds the scales of all groups that it has a column
of, and its columns are led by as many of code 0 as its first group has elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from core.errors import ModelError
from core_fp6.layouts import natural
from core_fp6.weights.packed import Packed, checked
from core_fp6.weights.scaling import Scheme


@dataclass(frozen=True)
class Cut:
    """Columns ``begin`` to ``begin + count`` of ``total``."""

    begin: int
    count: int
    total: int

    def is_whole(self) -> bool:
        """Whether nothing was cut."""
        return self.count == self.total

    def lead(self, scheme: Scheme) -> int:
        """Columns of the first group that are on other ranks."""
        return self.begin % scheme.group_size if scheme.group_size else 0

    def splits_groups(self, scheme: Scheme) -> bool:
        """Whether some group has columns on two ranks."""
        return (
            bool(scheme.group_size) and not self.is_whole() and self.count % scheme.group_size > 0
        )

    def scales(self, scheme: Scheme, whole: Tensor) -> Tensor:
        """What is needed here of the scales of all columns."""
        if not scheme.group_size:
            return whole
        end = scheme.groups(self.begin + self.count)
        return whole[..., self.begin // scheme.group_size : end].contiguous()


def cut_of(low: Tensor, columns: int, name: str) -> Cut:
    """How the low plane of a weight is cut.

    Args:
        low: the plane in natural layout; whole, or a tensor of which each rank holds a part.
        columns: of the whole weight.
        name: what errors call the weight.

    Raises:
        ModelError: when the columns cannot be cut evenly, at bytes of the planes.
    """
    shards, rank = 1, 0
    for dim, size in cut_dims(low):
        assert isinstance(low, DTensor)
        shards, rank = shards * size, rank * size + low.device_mesh.get_local_rank(dim)
    if shards > 1 and columns % (shards * natural.STEP):
        raise ModelError(
            f"{name} cannot be cut for {shards} ranks",
            why=f"{columns} columns are no multiple of {shards} times {natural.STEP}",
            fix="use another number of ranks",
        )
    count = columns // shards
    return Cut(rank * count, count, columns)


def cut_dims(tensor: Tensor) -> list[tuple[int, int]]:
    """Dimensions of the mesh over which the last dimension of a tensor is cut, and their sizes."""
    if not isinstance(tensor, DTensor):
        return []
    return [
        (dim, tensor.device_mesh.size(dim))
        for dim, placement in enumerate(tensor.placements)
        if getattr(placement, "dim", None) in (-1, tensor.ndim - 1)
    ]


def assembled(
    low: Tensor, high: Tensor, scale: Tensor, scheme: Scheme, cut: Cut, name: str
) -> Packed:
    """The columns that are here, as a weight of whole groups.

    Args:
        low: low plane of the columns that are here, in natural layout.
        high: high plane.
        scale: scales of the columns that are here, or of all.
        scheme: format and group size.
        cut: which columns are here.
        name: what errors call the weight.

    Raises:
        ModelError: when planes or scales cannot be those of the weight.
    """
    lead = cut.lead(scheme)
    whole = scale.ndim == low.ndim and scale.shape[-1] == scheme.groups(cut.total)
    if whole and not cut.is_whole():
        scale = cut.scales(scheme, scale)
    low, high = pad(low, (lead // 2, 0)), pad(high, (lead // natural.STEP, 0))
    return checked(low, high, scale, scheme, lead + cut.count, name)


def without_lead(weight: Packed, cut: Cut) -> tuple[Tensor, Tensor]:
    """Planes of the columns that are here, of a weight in natural layout."""
    lead = cut.lead(weight.scheme)
    return weight.low[..., lead // 2 :], weight.high[..., lead // natural.STEP :]


def here(tensor: Tensor) -> Tensor:
    """What this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def like(old: Tensor, new: Tensor) -> Tensor:
    """``new`` cut over ranks as ``old`` is; the last dimension may differ."""
    if not isinstance(old, DTensor):
        return new
    last = new.shape[-1]
    for _, size in cut_dims(old):
        last *= size
    shape = torch.Size((*old.shape[:-1], last))
    return DTensor.from_local(
        new.contiguous(),
        old.device_mesh,
        old.placements,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
