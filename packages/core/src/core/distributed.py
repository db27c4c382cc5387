"""The process among its ranks: where it runs, and agreement at the start."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, cast

from core.errors import CoreError, DataError, PluginError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


@dataclass
class Ranks:
    """This process among the ranks of its job, as ``torchrun`` describes it in the environment.

    Args:
        rank: global rank.
        world_size: number of ranks.
        local_rank: rank on this machine, which is also the index of its GPU.
        sequence_ranks: number of neighbouring ranks that share each sequence.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    sequence_ranks: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """Read ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``.

        Raises:
            CoreError: when they are no numbers that fit together.
        """
        try:
            found = cls(*(int(os.environ.get(k, d)) for k, d in _VARIABLES))
        except ValueError as error:
            raise CoreError("RANK, WORLD_SIZE or LOCAL_RANK is no number", why=str(error)) from None
        if not (0 <= found.rank < found.world_size and found.local_rank >= 0):
            raise CoreError("RANK, WORLD_SIZE and LOCAL_RANK do not fit together", why=str(found))
        return found

    def __post_init__(self) -> None:
        self._owns_group = False

    def join(self) -> None:
        """Join the default process group, unless there is one or the job has one rank."""
        if self.world_size == 1:
            return
        import torch
        import torch.distributed as dist

        if not dist.is_initialized():
            cuda = torch.cuda.is_available()
            if cuda:
                torch.cuda.set_device(self.local_rank)
            try:
                dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
            except (ValueError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                raise CoreError(
                    f"rank {self.rank} cannot join the {self.world_size} ranks of its job",
                    why=reason,
                    fix="start the ranks with torchrun",
                ) from error
            self._owns_group = True

    def leave(self) -> None:
        """Leave the process group if :meth:`join` made it."""
        if self._owns_group:
            import torch.distributed as dist

            self._owns_group = False
            dist.destroy_process_group()

    @cached_property
    def device(self) -> torch.device:
        """The GPU of this rank, or the CPU where there is none."""
        import torch

        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank)
        return torch.device("cpu")

    def share_sequences(self, ranks: int) -> None:
        """Let neighbouring ranks share each sequence, before anybody asks for :attr:`mesh`.

        Args:
            ranks: how many share one; 1 gives every rank sequences of its own.

        Raises:
            DataError: when the ranks of the job cannot be divided so.
        """
        if self.world_size % ranks:
            why = f"there are {self.world_size} ranks"
            raise DataError(f"{ranks} ranks cannot share each sequence", why=why)
        self.sequence_ranks = ranks

    @property
    def data_ranks(self) -> int:
        """Number of ranks, or of groups of them that share sequences, with data of their own."""
        return self.world_size // self.sequence_ranks

    @property
    def data_rank(self) -> int:
        """Which of the :attr:`data_ranks` this rank is, or belongs to."""
        return self.rank // self.sequence_ranks

    @cached_property
    def mesh(self) -> DeviceMesh | None:
        """All ranks by what they share; ``None`` for a single process.

        One data-parallel dimension ``dp``; where ranks share sequences, ``dp`` goes over the groups
        of those that do, and ``sp`` over the ranks of a group.
        """
        if self.sequence_ranks == 1:
            return self.flat_mesh
        from torch.distributed.device_mesh import init_device_mesh

        sizes = self.data_ranks, self.sequence_ranks
        return init_device_mesh(self.device.type, sizes, mesh_dim_names=("dp", "sp"))

    @cached_property
    def flat_mesh(self) -> DeviceMesh | None:
        """All ranks in one dimension ``dp``, for parameters, which are the same on all of them."""
        if self.world_size == 1:
            return None
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device.type, (self.world_size,), mesh_dim_names=("dp",))

    def new_cpu_group(self) -> ProcessGroup | None:
        """A gloo group of all ranks of its own, for talking in another thread than the rest.

        All ranks must ask for it together. ``None`` for a single process.
        """
        if self.world_size == 1:
            return None
        import torch.distributed as dist

        return cast("ProcessGroup", dist.new_group(backend="gloo"))

    @cached_property
    def _group(self) -> ProcessGroup | None:
        return self.new_cpu_group()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in the order of ranks; all ranks call it together."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, value, group=self._group)
        return everyone

    def agree(self, work: Callable[[], T]) -> T:
        """Do some work on this rank, and stop on all ranks when it fails on any.

        Without this a rank that fails leaves the others waiting for it in their next exchange.

        Args:
            work: must not talk to other ranks itself.

        Raises:
            Exception: what ``work`` raised on this rank.
            CoreError: on a rank where it went well, naming one where it did not.
        """
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        reasons = self.gather("" if failure is None else str(failure) or type(failure).__name__)
        if failure is not None:
            raise failure
        failed = [f"rank {rank} failed: {text}" for rank, text in enumerate(reasons) if text]
        if failed:
            raise CoreError(failed[0])
        return cast(T, result)

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Stop all ranks when their facts differ.

        Raises:
            PluginError: on every rank alike, naming the ranks, the fact, and both values.
        """
        everyone = self.gather({key: _text(value) for key, value in facts.items()})
        problems = []
        for key in sorted({key for one in everyone for key in one}):
            common = Counter(one.get(key, "absent") for one in everyone).most_common(1)[0][0]
            for rank, one in enumerate(everyone):
                value = one.get(key, "absent")
                if value != common:
                    problems.append(f"rank {rank} differs: {key} {value} (others {common})")
        if problems:
            raise PluginError("; ".join(problems), fix="install and configure all ranks alike")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, sort_keys=True)


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
