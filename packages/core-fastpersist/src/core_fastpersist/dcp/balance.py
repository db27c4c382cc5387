"""A planner for ``torch.distributed.checkpoint`` that splits replicated state evenly among ranks.

DCP's own planner gives each replicated tensor whole to one rank, so that one large tensor keeps a
rank writing while the others wait. This one cuts tensors between rows, as FastPersist
(arXiv 2406.13768) cuts the byte stream. What it plans, DCP's stock writers write and its stock
readers read.
"""

from __future__ import annotations

import io
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, TypeAlias

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.tensor import DTensor

from core.errors import CheckpointError
from core_fastpersist.dcp.places import Peers, Place, Writers as Writers, checked, choose, here
from core_fastpersist.dcp.rows import Run, split

_Items: TypeAlias = dict[MetadataIndex, WriteItem]

_PLAIN = (torch.Tensor, torch.nn.Parameter, DTensor)

_BYTES = 2**16
"""Byte vectors up to this size, such as states of random generators, are never cut."""

_OWN_NAME = "give what is a rank's own a name of its own, such as one with the rank in it"


class BalancedSavePlanner(DefaultSavePlanner):
    """Plans a save in which the ranks that hold the same tensors share the writing of them.

    What several ranks hold under one name is taken to be equal on them, as by DCP's own planner.
    Whatever the ranks of a group hold in common is split among its writers such that their bytes
    differ by at most one row: the widest of those tensors' slices along the first dimension.
    That covers plain tensors (DDP), replicated DTensors, and shards with replicas (HSDP). Scalars
    and byte vectors up to 64 KiB stay whole, so that no state of a random generator is mixed from
    two ranks. Objects that are no tensors are written by the first rank that has them. What one
    rank alone holds, it writes, so FSDP2 shards stay as they are, and so does everything in a
    single process.

    A planner that is used again plans a state of the same names and layouts only once; where the
    rank is alone, that goes for the whole plan. ``enable_plan_caching`` of DCP is not offered: it
    keeps plans per class, so that planners with other ``writers`` or another state would share them.

    Args:
        writers: who writes what several ranks hold; the coordinator's choice counts.
        flatten_state_dict: as in DCP's own planner.
        flatten_sharded_tensors: as in DCP's own planner.

    Raises:
        CheckpointError: for unknown ``writers``.

    Example:
        >>> import torch.distributed.checkpoint as dcp
        >>> planner = BalancedSavePlanner("socket")
        >>> dcp.save(state, checkpoint_id=folder, planner=planner)  # doctest: +SKIP
    """

    def __init__(
        self,
        writers: Writers = "replica",
        *,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
    ) -> None:
        super().__init__(flatten_state_dict, flatten_sharded_tensors)
        self.writers: Writers = checked(writers)
        self._held: list[WriteItem] = []
        self._first: dict[str, int] = {}
        self._last: _Last | None = None

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the state; one that is flat already is not walked through to find that out."""
        if any(type(value) not in _PLAIN for value in state_dict.values()):
            super().set_up_planner(state_dict, storage_meta, is_coordinator)
            return
        self.state_dict = state_dict
        self.mappings = {name: (name,) for name in state_dict} if self.flatten_state_dict else {}
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        """Plan this rank's state as DCP does, and tell the coordinator where the rank runs.

        A planner that is used again for a state of the same names and layouts plans it only once.
        """
        layouts = {name: _layout_of(value) for name, value in self.state_dict.items()}
        if self._last and self._last.layouts == layouts and self._last.mappings == self.mappings:
            return self._last.plan
        plan = super().create_local_plan()
        self._held = plan.items
        self._first = {}
        for position, item in enumerate(plan.items):  # those of one name follow each other
            self._first.setdefault(item.index.fqn, position)
        plan = replace(plan, planner_data=_Local(here(), plan.planner_data))
        self._last = _Last(layouts, self.mappings, plan)
        return plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Share what several ranks hold among its writers.

        Raises:
            CheckpointError: when a rank uses another planner, or ranks hold different tensors
                under one name.
        """
        last = self._last
        alone = last is not None and len(all_plans) == 1 and all_plans[0].items is last.plan.items
        if alone and last is not None and last.alone is not None:
            self.global_plan = [replace(all_plans[0], planner_data=last.alone[0])]
            self.metadata = replace(last.alone[1])
            return self.global_plan, self.metadata
        plans, metadata = super().create_global_plan(self._opened(all_plans))
        if alone and last is not None:
            last.alone = plans[0].planner_data, replace(metadata)
        return plans, metadata

    def _opened(self, all_plans: list[SavePlan]) -> list[SavePlan]:
        places: list[Place] = []
        plans: list[SavePlan] = []
        for rank, plan in enumerate(all_plans):
            local = plan.planner_data
            if not isinstance(local, _Local):
                raise CheckpointError(
                    f"rank {rank} saves with another planner",
                    fix=f"pass a {type(self).__name__} on every rank",
                )
            places.append(local.place)
            plans.append(replace(plan, planner_data=local.planner_data))
        return _shared_out(plans, places, self.writers)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The rows of this rank's tensor that it writes, without a copy of them."""
        if write_item.tensor_data is None:
            return super().resolve_data(write_item)
        chunk = write_item.tensor_data.chunk
        whole = self._holding(write_item.index, chunk)
        found = self.lookup_object(whole.index)
        held = _tensor_data(whole).chunk
        if chunk.sizes != held.sizes:
            first = chunk.offsets[0] - held.offsets[0]
            found = found.detach().narrow(0, first, chunk.sizes[0])
        resolved: torch.Tensor | io.BytesIO = self.transform_object(write_item, found)
        return resolved

    def _holding(self, index: MetadataIndex, chunk: ChunkStorageMetadata) -> WriteItem:
        """The item of this rank's own plan that the chunk is part of."""
        start = self._first.get(index.fqn, len(self._held))
        named = takewhile(
            lambda item: item.index.fqn == index.fqn,
            map(self._held.__getitem__, range(start, len(self._held))),
        )
        for item in named:
            if item.tensor_data is not None and _inside(chunk, item.tensor_data.chunk):
                return item
        raise CheckpointError(
            f"this rank is to write rows of {index.fqn} that it does not hold",
            why="the plan is not that of this save",
        )


@dataclass(frozen=True)
class _Local:
    """What a local plan carries to the coordinator."""

    place: Place
    planner_data: Any


@dataclass
class _Last:
    """The plan of the last save.

    Attributes:
        layouts: what it depends on: type, layout and sharding of every entry.
        mappings: how the names of a nested state came about.
        plan: this rank's part.
        alone: planner data and metadata of the whole, where this is the only rank.
    """

    layouts: dict[str, Any]
    mappings: Any
    plan: SavePlan
    alone: tuple[Any, Metadata] | None = None


def _layout_of(value: Any) -> Any:
    """What a plan depends on; an object that is no tensor is looked at when it is written."""
    if not isinstance(value, torch.Tensor):
        return None if not hasattr(value, "__create_write_items__") else object()
    if type(value) not in _PLAIN:
        return object()
    sharding = (value.device_mesh, value.placements) if isinstance(value, DTensor) else None
    return value.dtype, value.shape, value.stride(), value.device, value.requires_grad, sharding


def _shared_out(
    plans: Sequence[SavePlan], places: Sequence[Place], writers: Writers
) -> list[SavePlan]:
    """The plans, with everything that several of them hold given to its writers."""
    held = [_by_index(plan) for plan in plans]
    holders = _holders(held)
    _require_one_kind(holders, held)
    given: list[dict[MetadataIndex, list[WriteItem]]] = [{} for _ in plans]
    groups: dict[Peers, list[MetadataIndex]] = defaultdict(list)
    for index, ranks in holders.items():
        alone = len(ranks) == 1
        if alone or not any(_count_and_width(held[rank][index])[1] for rank in ranks):
            given[ranks[0]][index] = [held[ranks[0]][index]]
        else:
            _require_equal(index, ranks, held)
            groups[ranks].append(index)
    chosen = choose(writers, groups, places)
    for peers, indices in groups.items():
        _share(indices, chosen[peers], held, given)
    return [
        replace(plan, items=[piece for index in items for piece in mine.get(index, ())])
        for plan, items, mine in zip(plans, held, given, strict=True)
    ]


def _by_index(plan: SavePlan) -> _Items:
    items: _Items = {}
    for item in plan.items:
        items.setdefault(item.index, item)
    return items


def _holders(held: Sequence[_Items]) -> dict[MetadataIndex, Peers]:
    found: dict[MetadataIndex, list[int]] = defaultdict(list)
    for rank, items in enumerate(held):
        for index in items:
            found[index].append(rank)
    return {index: tuple(ranks) for index, ranks in found.items()}


def _require_one_kind(holders: Mapping[MetadataIndex, Peers], held: Sequence[_Items]) -> None:
    """Refuse a name that stands for unlike things, such as a tensor here and a number there."""
    named = Counter(index.fqn for index in holders)
    for index, ranks in holders.items():
        if named[index.fqn] > 1 and held[ranks[0]][index].type is not WriteItemType.SHARD:
            raise CheckpointError(
                f"ranks hold different things called {index.fqn}",
                why=f"that of rank {ranks[0]} is not that of all",
                fix=_OWN_NAME,
            )


def _require_equal(index: MetadataIndex, ranks: Peers, held: Sequence[_Items]) -> None:
    """Refuse to take rows of different tensors for rows of one."""
    first = _tensor_data(held[ranks[0]][index])
    for rank in ranks[1:]:
        other = _tensor_data(held[rank][index])
        if _layout(other) != _layout(first):
            raise CheckpointError(
                f"ranks {ranks[0]} and {rank} hold different tensors called {index.fqn}",
                why=f"{_described(first)} and {_described(other)}",
                fix=_OWN_NAME,
            )


def _layout(data: TensorWriteData) -> tuple[object, ...]:
    return data.size, data.chunk.sizes, data.properties.dtype


def _described(data: TensorWriteData) -> str:
    return f"{tuple(data.chunk.sizes)} of {tuple(data.size)} in {data.properties.dtype}"


def _share(
    indices: Sequence[MetadataIndex],
    writers: Peers,
    held: Sequence[_Items],
    given: Sequence[dict[MetadataIndex, list[WriteItem]]],
) -> None:
    """Split items by rows among their writers."""
    sizes = [_count_and_width(held[writers[0]][index]) for index in indices]
    counts, widths = [count for count, _ in sizes], [width for _, width in sizes]
    for rank, runs in zip(writers, split(counts, widths, len(writers)), strict=True):
        for run in runs:
            index = indices[run.tensor]
            item = held[rank][index]
            piece = item if run.count == counts[run.tensor] else _piece(item, run)
            given[rank].setdefault(index, []).append(piece)


def _count_and_width(item: WriteItem) -> tuple[int, int]:
    """Number of rows and bytes of a row; a width of zero for empty tensors and plain objects."""
    if item.tensor_data is None:
        return 1, 0
    sizes, properties = item.tensor_data.chunk.sizes, item.tensor_data.properties
    size = math.prod(sizes) * properties.dtype.itemsize
    blob = properties.dtype is torch.uint8 and len(sizes) == 1 and size <= _BYTES
    if size == 0 or not sizes or blob or properties.layout is not torch.strided:
        return 1, size
    return sizes[0], size // sizes[0]


def _piece(item: WriteItem, run: Run) -> WriteItem:
    data = _tensor_data(item)
    offsets = torch.Size((data.chunk.offsets[0] + run.first, *data.chunk.offsets[1:]))
    sizes = torch.Size((run.count, *data.chunk.sizes[1:]))
    return WriteItem(
        index=MetadataIndex(item.index.fqn, offsets),
        type=WriteItemType.SHARD,
        tensor_data=replace(data, chunk=ChunkStorageMetadata(offsets, sizes)),
    )


def _tensor_data(item: WriteItem) -> TensorWriteData:
    if item.tensor_data is None:
        raise CheckpointError(f"{item.index.fqn} is a tensor on some ranks only")
    return item.tensor_data


def _inside(part: ChunkStorageMetadata, whole: ChunkStorageMetadata) -> bool:
    return all(
        start <= first and first + count <= start + size
        for first, count, start, size in zip(
            part.offsets, part.sizes, whole.offsets, whole.sizes, strict=True
        )
    )
