"""Whether master weights and the weights that compute are those of one step of one run.

What computes is the rounded master, bit for bit. A few elements of every weight show files of two
checkpoints in one folder, and converters that have put weights into a wrong order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from core_ucp.execution.gathering import item_type, read_box
from core_ucp.sources.deepspeed.content import Content
from core_ucp.view.files import Files
from core_ucp.view.view import Atom

_MOST = 256
"""Elements that are read of a piece."""

Pair = tuple[str, Atom, Atom]
"""Name of a weight, its master, and what computes."""


def require_agreement(content: Content, pairs: Sequence[Pair]) -> None:
    """Compare the first and the last elements of masters with what computes.

    A few weights may differ, where a program has changed them between two steps: the masters count,
    and a remark says so.

    Raises:
        CheckpointError: when most weights differ.
    """
    filled = [pair for pair in pairs if pair[1].numel]
    wrong = [name for name, master, half in filled if not agree(content.files, master, half)]
    if 2 * len(wrong) > len(filled):
        raise content.fail(
            "holds master weights that are not those of the model",
            why=f"{len(wrong)} of {len(filled)} differ from what computes, as {wrong[0]}:"
            " files of two checkpoints are mixed, or a converter has confused their order",
            fix="take all files from one checkpoint as DeepSpeed has saved it",
        )
    if wrong:
        content.remarks.append(
            f"the masters of {len(wrong)} weights are not what computes, as of {wrong[0]};"
            " masters are taken, as DeepSpeed does"
        )


def agree(files: Files, master: Atom, half: Atom) -> bool:
    """Whether the first and the last elements of a weight are those of its rounded master."""
    for row in {0, len(master.pieces) - 1}:
        start = master.pieces.boxes.start[row].tolist()
        size = master.pieces.boxes.size[row].tolist()
        shape = [*(1 for _ in size[:-1]), *(min(_MOST, width) for width in size[-1:])]
        exact, rounded = (_read(files, atom, start, shape) for atom in (master, half))
        expected = exact.to(half.dtype)
        same = expected.view(torch.uint8) == rounded.view(torch.uint8)
        if not bool((same.reshape(len(rounded), -1).all(1) | expected.isnan()).all()):
            return False
    return True


def _read(files: Files, atom: Atom, start: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    items = np.empty(shape, item_type(atom.dtype.itemsize))
    read_box(files, atom, start, items)
    return torch.from_numpy(items.reshape(-1).view(np.uint8)).view(atom.dtype)
