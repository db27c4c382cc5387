"""Reading whole atoms once more: digests, equality of copies, equality of two checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from core.errors import CheckpointError
from core_ucp.execution.digest import Digest, digest_of
from core_ucp.execution.gathering import item_type, read_box, read_pieces
from core_ucp.execution.planning import in_blocks
from core_ucp.view.boxes import untiled
from core_ucp.view.pieces import Pieces
from core_ucp.view.view import Atom, View

Progress = Callable[[int], None]
_BLOCK = 2**20


@dataclass(frozen=True)
class Finding:
    """What was found of one atom.

    Attributes:
        key: of the atom.
        status: ``unchecked`` has nothing to be held against: it could be read, no more.
        problem: empty unless the status is ``bad``.
    """

    key: str
    status: Literal["ok", "unchecked", "bad"]
    problem: str = ""


def verify(view: View, progress: Progress | None = None) -> Iterator[Finding]:
    """Hold every atom against all that the checkpoint says of it.

    That is: its pieces tile it and lie in their files, its digest is the one noted at the save, all
    copies of it hold the same bits, and its half-precision copy is the rounded full-precision one.

    Args:
        view: the checkpoint.
        progress: is told of every number of bytes that was read.
    """
    for key, atom in view.atoms.items():
        try:
            status = _check(view, key, atom)
        except CheckpointError as error:
            yield Finding(key, "bad", str(error))
        else:
            yield Finding(key, status)
        if progress is not None:
            progress(atom.nbytes)


def _check(view: View, key: str, atom: Atom) -> Literal["ok", "unchecked"]:
    problem = untiled(atom.shape, atom.pieces.boxes)
    if problem:
        raise CheckpointError(f"{view.path} does not hold {key} as a whole", why=problem)
    view.files.require(key, atom.pieces, atom.stored.itemsize)
    found = digest(view, atom)
    saved = view.digests.get(key)
    if saved is not None and saved != str(found):
        raise CheckpointError(f"{key} is not what was saved", why=f"{found} is not {saved}")
    require_equal_copies(view, key, atom)
    twin = view.twins.get(key)
    if twin is not None:
        _require_rounded(view, key, atom, twin)
    checked = saved is not None or atom.replicas is not None or twin is not None
    return "ok" if checked else "unchecked"


def digest(view: View, atom: Atom) -> Digest:
    """Digest of an atom as it is stored, wherever its pieces lie."""
    total = Digest()
    for start, block in _blocks(view, atom):
        total += digest_of(block.view(np.uint8), start * atom.stored.itemsize)
    return total


def _blocks(view: View, atom: Atom) -> Iterator[tuple[int, np.ndarray]]:
    """The elements of an atom in row-major order, with the number of the first of each block."""
    step = max(1, _BLOCK // atom.stored.itemsize)
    for begin in range(0, atom.numel, step):
        end = min(atom.numel, begin + step)
        boxes = Pieces.flat(atom.shape, begin, end, 0, 0, atom.stored.itemsize)
        block = np.empty(end - begin, item_type(atom.stored.itemsize))
        places = boxes.offset // atom.stored.itemsize
        for start, size, place, volume in zip(
            boxes.boxes.start.tolist(),
            boxes.boxes.size.tolist(),
            places.tolist(),
            boxes.boxes.volume.tolist(),
            strict=True,
        ):
            read_box(view.files, atom, start, block[place : place + volume].reshape(size))
        yield begin, block


def require_equal_copies(view: View, key: str, atom: Atom) -> None:
    """Make sure that all copies of an atom hold the same bits, block by block.

    Raises:
        CheckpointError: naming the file of a copy that differs from the first one.
    """
    if atom.replicas is None:
        return
    view.files.require(key, atom.replicas, atom.stored.itemsize)
    copies = in_blocks(atom.replicas, atom.stored.itemsize)
    kind = item_type(atom.stored.itemsize)
    rows = zip(copies.boxes.start.tolist(), copies.boxes.size.tolist(), strict=True)
    for row, (start, size) in enumerate(rows):
        first, other = np.empty(size, kind), np.empty(size, kind)
        read_box(view.files, atom, start, first)
        read_pieces(view.files, copies.take(np.array([row])), start, other)
        if first.tobytes() != other.tobytes():
            raise CheckpointError(
                f"the copies of {key} differ",
                why=f"{view.files.names[int(copies.file[row])]} has other bits than the first copy",
                fix="where they were trained apart, a rule can average them",
            )


def _require_rounded(view: View, key: str, atom: Atom, twin: Atom) -> None:
    """Make sure that the half-precision copy is the full-precision one, rounded to nearest even."""
    pairs = zip(_blocks(view, atom), _rest(view, twin, atom), strict=True)
    for (begin, block), other in pairs:
        values = torch.from_numpy(block.view(np.uint8)).view(atom.stored).to(twin.dtype)
        rounded = values.view(torch.uint8).numpy()
        differ = np.flatnonzero(rounded != other.view(np.uint8))
        if len(differ):
            place = begin + int(differ[0]) // twin.dtype.itemsize
            raise CheckpointError(
                f"{key} and its {twin.dtype} copy differ", why=f"first at element {place:,}"
            )


def _rest(view: View, twin: Atom, atom: Atom) -> Iterator[np.ndarray]:
    """Blocks of a twin with as many elements as those of its atom."""
    step = max(1, _BLOCK // atom.stored.itemsize)
    flat = np.empty(0, item_type(twin.dtype.itemsize))
    for _, block in _blocks(view, twin):
        flat = np.concatenate([flat, block])
        while len(flat) >= step:
            yield flat[:step]
            flat = flat[step:]
    if len(flat):
        yield flat


@dataclass(frozen=True)
class Difference:
    """How one atom differs between two checkpoints, whatever their layouts."""

    key: str
    problem: str


def diff(left: View, right: View, progress: Progress | None = None) -> Iterator[Difference]:
    """Differences between two checkpoints, bit for bit and independent of how they are cut.

    Args:
        left: a checkpoint.
        right: another one.
        progress: is told of every number of bytes that was compared.
    """
    for key in [*left.atoms, *(k for k in right.atoms if k not in left.atoms)]:
        a, b = left.atoms.get(key), right.atoms.get(key)
        if a is None or b is None:
            yield Difference(key, f"only in {(left if b is None else right).path}")
            continue
        problem = _difference(left, a, right, b)
        if problem:
            yield Difference(key, problem)
        if progress is not None:
            progress(a.nbytes)


def _difference(left: View, a: Atom, right: View, b: Atom) -> str:
    if a.shape != b.shape:
        return f"shape {list(a.shape)} and {list(b.shape)}"
    if a.dtype != b.dtype:
        return f"{a.dtype} and {b.dtype}"
    count, first = 0, -1
    for (begin, x), (_, y) in zip(_blocks(left, a), _blocks(right, b), strict=True):
        differ = np.flatnonzero(x != y)
        if len(differ) and first < 0:
            first = begin + int(differ[0])
        count += len(differ)
    return f"{count:,} of {a.numel:,} elements, the first at {first:,}" if count else ""
