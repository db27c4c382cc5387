"""Ranks exchange tokens for heads and back, one chunk at a time (paper, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class Headed(NamedTuple):
    """A tensor with heads, and which of them each rank attends with.

    Args:
        tensor: (B, H, T, D).
        heads: neighbouring heads of each rank; ranks may have some in common.
    """

    tensor: Tensor
    heads: Sequence[range]


def to_heads(parts: Sequence[Headed], pieces: Sequence[int], group: ProcessGroup) -> list[Tensor]:
    """Exchange tokens for heads; all ranks call it together. Without gradient.

    Args:
        parts: of one chunk, with all heads and the tokens of this rank.
        pieces: tokens of each rank.
        group: the ranks.

    Returns:
        For each part its heads of this rank, with the tokens of all ranks in their order.
    """
    own, ranks = group.rank(), range(group.size())
    sent = [[part.tensor[:, cut(part.heads[rank])] for part in parts] for rank in ranks]
    shapes = [
        [_shape(part.tensor, len(part.heads[own]), tokens) for part in parts] for tokens in pieces
    ]
    received = _swap(sent, shapes, group)
    return [torch.cat(tensors, dim=2) for tensors in zip(*received, strict=True)]


def to_sequence(
    parts: Sequence[Headed], pieces: Sequence[int], group: ProcessGroup
) -> list[Tensor]:
    """Exchange heads for tokens, the way back; all ranks call it together. Without gradient.

    Args:
        parts: of one chunk, with the heads of this rank and the tokens of all ranks.
        pieces: tokens of each rank.
        group: the ranks.

    Returns:
        For each part all heads, with the tokens of this rank. What several ranks have of one head is
        added up: so are gradients of keys that several ranks read.
    """
    ranks, mine = range(group.size()), pieces[group.rank()]
    split = [torch.split(part.tensor, list(pieces), dim=2) for part in parts]
    sent = [[tokens[rank] for tokens in split] for rank in ranks]
    shapes = [
        [_shape(part.tensor, len(part.heads[rank]), mine) for part in parts] for rank in ranks
    ]
    received = zip(*_swap(sent, shapes, group), strict=True)
    return [_joined(tensors, part.heads) for tensors, part in zip(received, parts, strict=True)]


def cut(heads: range) -> slice:
    """Neighbouring heads as an index."""
    return slice(heads.start, heads.stop)


def _swap(
    sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[torch.Size]], group: ProcessGroup
) -> list[list[Tensor]]:
    """Exchange all tensors in one go, in their common dtype.

    Args:
        sent: the tensors for each rank.
        shapes: of the tensors from each rank.
        group: the ranks.

    Returns:
        The tensors from each rank, in the dtypes of those that were sent.
    """
    flat = torch.cat([tensor.reshape(-1) for tensors in sent for tensor in tensors])
    sizes = [[shape.numel() for shape in some] for some in shapes]
    found = flat.new_empty(sum(map(sum, sizes)))
    given = [sum(tensor.numel() for tensor in tensors) for tensors in sent]
    dist.all_to_all_single(found, flat, [sum(some) for some in sizes], given, group=group)
    pieces = iter(torch.split(found, [size for some in sizes for size in some]))
    dtypes = [tensor.dtype for tensor in sent[0]]
    return [
        [next(pieces).view(shape).to(dtype) for shape, dtype in zip(some, dtypes, strict=True)]
        for some in shapes
    ]


def _joined(tensors: Sequence[Tensor], heads: Sequence[range]) -> Tensor:
    """Put the heads of all ranks together."""
    total = heads[-1].stop
    if sum(map(len, heads)) == total:
        return torch.cat(list(tensors), dim=1)
    like = tensors[0]
    precise = torch.promote_types(like.dtype, torch.float32)
    whole = like.new_zeros(_shape(like, total, like.shape[2]), dtype=precise)
    for tensor, own in zip(tensors, heads, strict=True):
        whole[:, cut(own)] += tensor
    return whole.to(like.dtype)


def _shape(like: Tensor, heads: int, tokens: int) -> torch.Size:
    return torch.Size((like.shape[0], heads, tokens, like.shape[3]))
