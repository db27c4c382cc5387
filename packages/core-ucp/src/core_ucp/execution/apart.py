"""The proof that a plan writes no byte twice, and none outside of its file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from core.errors import CheckpointError
from core_ucp.view.boxes import Table
from core_ucp.view.pieces import Pieces

if TYPE_CHECKING:
    from core_ucp.execution.planning import Copies, Plan

_FILE, _BEGIN, _END, _OWNER = range(4)
_HEADER = -1


def require_apart(plan: Plan) -> None:
    """Make sure that every byte of a target is written once at most.

    Raises:
        CheckpointError: naming the atom, the file and the byte.
    """
    table = np.concatenate([_parts(plan), *_spans(plan.copies)])
    table = table[np.lexsort((table[:, _BEGIN], table[:, _FILE]))]
    sizes = np.array([file.size for file in plan.target.files], np.int64)
    outside = (table[:, _BEGIN] < 0) | (table[:, _END] > sizes[table[:, _FILE]])
    if outside.any():
        raise CheckpointError(_words(plan, table[outside][0], "does not fit into"))
    # In the order of their begins, spans are apart if each begins behind the end of all before it.
    ends = table[:, _FILE] * (int(sizes.max(initial=0)) + 1) + table[:, _END]
    begins = ends - table[:, _END] + table[:, _BEGIN]
    twice = begins[1:] < np.maximum.accumulate(ends)[:-1]
    if twice.any():
        raise CheckpointError(_words(plan, table[1:][twice][0], "would overwrite a part of"))


def _parts(plan: Plan) -> Table:
    rows = [
        (file, offset, offset + len(data), _HEADER)
        for file, new in enumerate(plan.target.files)
        for offset, data in new.parts
        if data
    ]
    return np.array(rows, np.int64).reshape(-1, 4)


def _spans(copies: Sequence[Copies]) -> Iterator[Table]:
    """Byte ranges in new files: one for a block without gaps, else one for every run."""
    if not copies:
        return
    sizes = [each.wanted.atom.dtype.itemsize for each in copies]
    lengths = [each.blocks.boxes.volume * size for each, size in zip(copies, sizes, strict=True)]
    rows = [
        np.concatenate([each.blocks.file for each in copies]),
        np.concatenate([each.blocks.offset for each in copies]),
        np.concatenate(lengths),
        np.repeat(np.arange(len(copies), dtype=np.int64), [len(each.blocks) for each in copies]),
    ]
    dense = np.concatenate([each.dense for each in copies])
    yield _table(*(column[dense] for column in rows))
    for number, (each, size) in enumerate(zip(copies, sizes, strict=True)):
        for row in np.flatnonzero(~each.dense).tolist():
            yield _runs(each.blocks, row, size, number)


def _runs(pieces: Pieces, row: int, itemsize: int, number: int) -> Table:
    shape, stride = pieces.boxes.size[row].tolist(), pieces.stride[row].tolist()
    order = sorted(range(len(shape)), key=lambda dim: stride[dim])
    run = itemsize
    while order and stride[order[0]] == run:
        run *= shape[order.pop(0)]
    begins = pieces.offset[row : row + 1]
    for dim in order:
        begins = (begins[:, None] + np.arange(shape[dim], dtype=np.int64) * stride[dim]).reshape(-1)
    file, length, owner = (np.full_like(begins, n) for n in (pieces.file[row], run, number))
    return _table(file, begins, length, owner)


def _table(file: Table, begin: Table, length: Table, owner: Table) -> Table:
    return np.stack([file, begin, begin + length, owner], axis=1)


def _words(plan: Plan, row: Table, what: str) -> str:
    owner = "a header" if row[_OWNER] == _HEADER else plan.copies[int(row[_OWNER])].wanted.key
    return f"{owner} {what} {plan.target.files[int(row[_FILE])].name}, at byte {int(row[_BEGIN]):,}"
