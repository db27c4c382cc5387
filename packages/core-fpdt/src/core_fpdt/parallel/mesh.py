"""The ranks that share each sequence, and those that average gradients with them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from core.errors import SettingsError


@dataclass(frozen=True)
class Peers:
    """This process among the ranks that share its sequences.

    Args:
        group: the ranks that share each sequence.
        others: for every other dimension of the mesh, the ranks along it: they have other sequences,
            and average their gradients with these.
    """

    group: ProcessGroup
    others: tuple[ProcessGroup, ...] = ()

    @cached_property
    def rank(self) -> int:
        """Number of this rank among those that share its sequences."""
        return dist.get_rank(self.group)

    @cached_property
    def size(self) -> int:
        """Number of ranks that share each sequence."""
        return dist.get_world_size(self.group)

    @cached_property
    def averaged(self) -> int:
        """Number of ranks over which gradients are averaged."""
        size = self.size
        for group in self.others:
            size *= dist.get_world_size(group)
        return size

    def gather(self, facts: Tensor) -> Tensor:
        """What every rank knows, on every rank; all ranks of the mesh call it together.

        Args:
            facts: (F,) of one size and dtype on all ranks.

        Returns:
            (groups, ranks of a group, F) on the CPU.
        """
        everyone = facts.to(_device_of(self.group))
        for group in (self.group, *self.others):
            found = [torch.empty_like(everyone) for _ in range(dist.get_world_size(group))]
            dist.all_gather(found, everyone, group=group)
            everyone = torch.cat(found)
        return everyone.view(-1, self.size, facts.numel()).cpu()


def peers_of(where: ProcessGroup | DeviceMesh, dim: str) -> Peers:
    """Find the ranks that share each sequence.

    Args:
        where: those ranks, which average gradients among themselves; or a mesh of all ranks that
            average gradients, in one of whose dimensions they lie.
        dim: that dimension.

    Raises:
        SettingsError: when the mesh has no such dimension.
    """
    if isinstance(where, ProcessGroup):
        return Peers(where)
    names = where.mesh_dim_names or ()
    if dim not in names:
        raise SettingsError(
            f"the mesh has no dimension {dim!r}",
            why=f"its dimensions are: {', '.join(names) or 'unnamed'}",
            fix="name one of them in fpdt.mesh_dim",
        )
    others = tuple(where.get_group(name) for name in names if name != dim)
    return Peers(where.get_group(dim), others)


def _device_of(group: ProcessGroup) -> torch.device:
    """Where tensors have to be for an exchange in the group."""
    on_cpu = "cpu:" in dist.get_backend_config(group)
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
