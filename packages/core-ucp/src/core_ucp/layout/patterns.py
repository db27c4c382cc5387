"""The patterns of the Universal Checkpointing paper (arXiv 2406.18820, its language), as layouts.

The paper names five patterns by how a parameter is put together; layouts say the same by where its
elements lie, which also holds for taking it apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from core_ucp.layout.deepspeed import from_deepspeed as from_deepspeed
from core_ucp.layout.layouts import (
    Average,
    Chain,
    Expert,
    Fused,
    Layout,
    Owner,
    Pad,
    Replicate,
    Segment,
    Shard,
)
from core_ucp.layout.shards import Sizes


def unique_params(at: Mapping[str, int] | None = None) -> Layout:
    """``unique_params``: one model-parallel rank owns the parameter.

    What data-parallel ranks hold of it is a matter of flat buffers, see
    :mod:`core_ucp.layout.flat`.

    Args:
        at: the owner's position, such as ``{"pp": 1}``; a single rank unless given.
    """
    return Owner(dict(at)) if at else Replicate()


def replicated_params() -> Layout:
    """``replicated_params``: every rank holds a copy, and all copies have the same bits."""
    return Replicate()


def fragment_params(dim: int, axis: str = "tp", sizes: Sizes = "stored") -> Layout:
    """``fragment_params``: a dimension is cut over an axis.

    Args:
        dim: 0 for column-parallel weights, embeddings and biases, 1 for row-parallel weights.
        axis: of the mesh.
        sizes: uneven ones are those of every rank, or ``"balanced"``, or ``"stored"``.
    """
    return Shard(dim, axis, sizes)


def fused_halves(dim: int = 0, axis: str = "tp") -> Layout:
    """``fragment_params`` with two equal sub-parameters, such as gate and up of SwiGLU."""
    return Fused(dim, axis, (Segment(sizes="stored"),) * 2)


def fused_params(
    widths: Sequence[int],
    dim: int = 0,
    axis: str = "tp",
    shares: Sequence[Sequence[int]] | None = None,
) -> Layout:
    """``fragment_params`` with sub-parameters of different widths, such as QKV with GQA.

    Args:
        widths: of the sub-parameters along ``dim``.
        dim: along which they are joined.
        axis: of the mesh.
        shares: widths of every rank's part of each sub-parameter, where they are not even.
    """
    if shares is None:
        return Fused(dim, axis, tuple(Segment(width) for width in widths))
    cuts = zip(widths, shares, strict=True)
    return Fused(dim, axis, tuple(Segment(width, sizes=tuple(each)) for width, each in cuts))


def expert_params(
    dim: int = 0,
    axis: str = "ep",
    placement: Literal["ceil", "balanced"] | tuple[tuple[int, ...], ...] = "ceil",
    inside: Layout | None = None,
) -> Layout:
    """``fragment_params`` of three dimensions: experts over one axis, each cut over another.

    Args:
        dim: that counts experts.
        axis: of the mesh.
        placement: of experts, see :class:`~core_ucp.layout.blocks.Expert`.
        inside: how every expert is cut, such as ``Shard(2, "tp")``.
    """
    expert = Expert(dim, axis, placement)
    return expert if inside is None else Chain((expert, inside))


def params_to_average(axis: str = "tp") -> Layout:
    """``params_to_average``: every rank trains its own copy, and their mean counts.

    The only pattern that loses something; rules refuse it without ``lossy``.

    Args:
        axis: of the mesh.
    """
    return Average(axis)


def vocabulary_params(
    original: int, axis: str = "tp", padded: int | Literal["stored"] = "stored"
) -> Layout:
    """The vocabulary: rows that are padded, then cut over an axis.

    Args:
        original: rows without padding.
        axis: of the mesh.
        padded: rows with padding.
    """
    return Chain((Pad(0, size=padded, unpadded=original), Shard(0, axis, "stored")))
