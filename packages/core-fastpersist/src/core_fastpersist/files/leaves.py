"""Tensors among the leaves of a tree: which bytes are stored, and what leads back to each of them.

Tensors that share memory are stored once. A tensor alone in its memory is stored row by row under its
own name, so that stock readers see its values; its record says what else is to be restored. Of those
that share memory, one that covers the others is stored like that and the others are views of it; where
none does, the bytes they span are stored as they are, and all are views of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.checkpoints.safetensors import DTYPES
from core.errors import CheckpointError
from core_fastpersist.files.header import METADATA, PREFIX
from core_fastpersist.files.scalars import dtype_name
from core_fastpersist.files.views import is_dense, span

Record = dict[str, Any]
"""JSON object that leads from stored bytes to a tensor."""

NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
"""Names that the format gives to dtypes; others are stored as bytes."""
_MEMORY = PREFIX + "memory"


@dataclass(frozen=True)
class Stored:
    """A tensor of the file.

    Args:
        name: its name.
        dtype: what the format calls its dtype.
        shape: as the format tells it.
        data: tensor whose elements, row by row, are the bytes; a multiple of ``align`` is stored, and
            what ``data`` lacks of it is zero.
        align: bytes that its place in the file must be a multiple of.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Tensor
    align: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return -(-self.data.nbytes // self.align) * self.align


@dataclass(frozen=True)
class _Leaf:
    name: str
    tensor: Tensor
    record: Record
    begin: int
    end: int

    @property
    def same(self) -> tuple[Any, ...]:
        """Equal for leaves that are the same view of the same memory."""
        tensor = self.tensor
        return self.begin, tensor.dtype, tuple(tensor.shape), tensor.stride()

    def covers(self, begin: int, end: int) -> bool:
        return self.begin == begin and self.end == end and self.tensor.is_contiguous()


class Leaves:
    """Collects tensors, and works out what is stored when all are there."""

    def __init__(self) -> None:
        self._names: set[str] = {METADATA}
        self._leaves: list[_Leaf] = []

    def add(self, name: str, tensor: Tensor) -> Record:
        """Take a tensor.

        Args:
            name: what it should be called in the file.
            tensor: any tensor with memory; it is not copied.

        Returns:
            its record, which :meth:`finish` fills in.

        Raises:
            CheckpointError: for a tensor that is no plain array in memory, naming its kind.
        """
        _require_plain(name, tensor)
        tensor = tensor.detach().resolve_conj().resolve_neg()
        begin = tensor.data_ptr()
        leaf = _Leaf(self.free_name(name), tensor, {}, begin, begin + _extent(tensor))
        self._leaves.append(leaf)
        return leaf.record

    def free_name(self, name: str) -> str:
        """The name, or with a suffix where it is taken; what UTF-8 cannot hold becomes ``?``."""
        name = name.encode("utf-8", "replace").decode()
        found, number = name, 1
        while found in self._names:
            number += 1
            found = f"{name}~{number}"
        self._names.add(found)
        return found

    def finish(self) -> list[Stored]:
        """Fill in all records and tell what is stored, in the order of the tree."""
        order = {id(leaf): index for index, leaf in enumerate(self._leaves)}
        groups = [sorted(g, key=lambda leaf: order[id(leaf)]) for g in _groups(self._leaves)]
        groups.sort(key=lambda group: order[id(group[0])])
        return [self._store(group) for group in groups]

    def _store(self, group: list[_Leaf]) -> Stored:
        first = group[0]
        if all(leaf.same == first.same for leaf in group):
            stored, record = _alone(first.name, first.tensor)
            for leaf in group:
                leaf.record.update(record)
            return stored
        begin, end = min(leaf.begin for leaf in group), max(leaf.end for leaf in group)
        bases = [leaf for leaf in group if leaf.covers(begin, end)]
        if not bases or not _aligned(group, begin):
            return self._union(group, begin, end)
        base = next((leaf for leaf in bases if leaf.tensor.dtype in NAMES), bases[0])
        align = max(leaf.tensor.itemsize for leaf in group)
        stored, record = _alone(base.name, base.tensor, align)
        for leaf in group:
            same = leaf.same == base.same
            leaf.record.update(record if same else _view(stored.name, leaf, begin))
        return stored

    def _union(self, group: list[_Leaf], begin: int, end: int) -> Stored:
        """All bytes from the first to the last that tensors with common memory have."""
        align = max(leaf.tensor.itemsize for leaf in group)
        for leaf in group:
            memory = leaf.tensor.untyped_storage()
            # Views begin at whole elements of their own, counted from where the storage begins.
            first = begin - (begin - memory.data_ptr()) % align
            inside = memory.data_ptr() <= begin and end <= memory.data_ptr() + memory.nbytes()
            if inside and _aligned(group, first):
                data = span(leaf.tensor, first - memory.data_ptr(), end - first)
                size = -(-data.nbytes // align) * align
                stored = Stored(self.free_name(_MEMORY), "U8", (size,), data, align)
                for view in group:
                    view.record.update(_view(stored.name, view, first))
                return stored
        names = ", ".join(repr(leaf.name) for leaf in group[:3])
        raise CheckpointError(
            f"{names} share memory that belongs to several storages",
            fix="clone() one of them",
        )


def _alone(name: str, tensor: Tensor, align: int = 1) -> tuple[Stored, Record]:
    """A tensor stored row by row, and its record."""
    record: Record = {"tensor": name}
    shape = tuple(tensor.shape)
    expanded = [
        dim for dim, step in enumerate(tensor.stride()) if step == 0 and tensor.shape[dim] > 1
    ]
    if expanded and tensor.numel():
        record["expanded"] = expanded
    elif not tensor.is_contiguous() and is_dense(shape, tensor.stride()):
        record["stride"] = list(tensor.stride())
    align = max(align, tensor.itemsize)
    if tensor.dtype in NAMES and tensor.nbytes % align == 0:
        return Stored(name, NAMES[tensor.dtype], shape, tensor, align), record
    record |= {"dtype": dtype_name(tensor.dtype), "shape": list(shape)}
    size = -(-tensor.nbytes // align) * align
    return Stored(name, "U8", (size,), tensor, align), record


def _view(base: str, leaf: _Leaf, begin: int) -> Record:
    return {
        "view": base,
        "offset": leaf.begin - begin,
        "dtype": dtype_name(leaf.tensor.dtype),
        "shape": list(leaf.tensor.shape),
        "stride": list(leaf.tensor.stride()),
    }


def _aligned(group: Sequence[_Leaf], begin: int) -> bool:
    """Whether every leaf begins at a whole element of its own, counted from ``begin``."""
    return all((leaf.begin - begin) % leaf.tensor.itemsize == 0 for leaf in group)


def _groups(leaves: Sequence[_Leaf]) -> Iterator[list[_Leaf]]:
    """Leaves by the memory they share; what is empty shares none."""
    full = [leaf for leaf in leaves if leaf.end > leaf.begin]
    yield from ([leaf] for leaf in leaves if leaf.end == leaf.begin)
    group: list[_Leaf] = []
    reach: tuple[str, int] = "", 0
    for leaf in sorted(full, key=lambda leaf: (str(leaf.tensor.device), leaf.begin)):
        device = str(leaf.tensor.device)
        if group and (device != reach[0] or leaf.begin >= reach[1]):
            yield group
            group = []
        reach = device, max(leaf.end, reach[1] if group else 0)
        group.append(leaf)
    if group:
        yield group


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element of a tensor to its last."""
    if tensor.numel() == 0:
        return 0
    steps = ((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (sum(steps) + 1) * tensor.itemsize


def _require_plain(name: str, tensor: Tensor) -> None:
    kind = type(tensor)
    if kind.__name__ == "DTensor":
        raise CheckpointError(
            f"{name!r} is a DTensor, which no single file can hold",
            fix="save it with dcp, or its full_tensor()",
        )
    if kind not in (Tensor, torch.nn.Parameter):
        raise CheckpointError(
            f"{name!r} is a {kind.__module__}.{kind.__qualname__}, a tensor with a meaning of its own",
            fix="save the plain tensors it is made of",
        )
    if tensor.device.type == "meta":
        raise CheckpointError(f"{name!r} is on the meta device and has no values")
    odd = {
        "is nested": tensor.is_nested,
        f"has the layout {tensor.layout}": tensor.layout != torch.strided,
        f"is quantized ({tensor.dtype})": tensor.is_quantized,
    }
    for reason in (reason for reason, found in odd.items() if found):
        raise CheckpointError(
            f"a file cannot hold {name!r}",
            why=f"it {reason}",
            fix="save the plain tensors it is made of",
        )
