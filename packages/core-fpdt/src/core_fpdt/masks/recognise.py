"""Recognising the mask functions that transformers makes.

A mask reaches an attention as one function of four indices. Those that transformers composes of its
own parts are taken apart again by comparing code objects with ones it makes here. What they mean is
checked on a few tokens first: a version that changed a meaning, or a name, leaves a function that
is evaluated, never a wrong mask.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor

from core_fpdt.masks.composed import And, Composed, both, either
from core_fpdt.masks.evaluated import Extent, MaskFunction, Unknown
from core_fpdt.masks.held import Alike, Padding, Remapped
from core_fpdt.masks.rules import (
    EVERYTHING,
    Causal,
    Chunked,
    Constant,
    Rule,
    Shifted,
    Surroundings,
    Window,
    grid,
)

logger = logging.getLogger("core")

Variables = Mapping[str, Any]
Recogniser = Callable[[MaskFunction], Rule]
Reading = Callable[[Variables, Recogniser], Rule | None]
"""Makes a rule of what a closure holds; ``None`` where that is not what it should be."""

_SIDE = 8
_SPAN = (0, _SIDE)


def recognise(function: MaskFunction, extent: Extent, *, use_vmap: bool = False) -> Rule:
    """Make the rule that a mask function computes.

    Args:
        function: (batch, head, query, key) indices to whether the query sees the key.
        extent: what the mask will be asked about.
        use_vmap: how parts that are not recognised are evaluated.
    """
    return _recognise(function, _stock(), extent, use_vmap)


def _recognise(
    function: MaskFunction, stock: Mapping[CodeType, Reading], extent: Extent, use_vmap: bool
) -> Rule:
    def inner(part: MaskFunction) -> Rule:
        return _recognise(part, stock, extent, use_vmap)

    reading = stock.get(function.__code__) if isinstance(function, FunctionType) else None
    rule = None if reading is None else reading(_variables(function), inner)
    return Unknown(extent, function, use_vmap) if rule is None else rule


def _variables(function: Any) -> Variables:
    cells = function.__closure__ or ()
    return {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, cells, strict=True)
    }


@cache
def _stock() -> Mapping[CodeType, Reading]:
    """How to read transformers' functions, by their code; those that mean something else are left out."""
    stock: dict[CodeType, Reading] = {}
    for name, make, reading in _samples():
        try:
            function = make()
            sound = _agrees(function, {**stock, function.__code__: reading})
        except Exception as error:
            logger.debug("transformers has no %s as we know it: %r", name, error)
            continue
        if sound:
            stock[function.__code__] = reading
        else:
            logger.debug("transformers' %s means something else", name)
    return stock


def _agrees(function: MaskFunction, stock: Mapping[CodeType, Reading]) -> bool:
    extent = Extent(2, _SPAN, _SPAN, torch.device("cpu"))
    rule = _recognise(function, stock, extent, False)
    at = grid(*extent)
    wanted = Unknown(extent, function).visible(at)
    return torch.equal(
        rule.visible(at).expand(2, 1, _SIDE, _SIDE), wanted.expand(2, 1, _SIDE, _SIDE)
    )


def _samples() -> Iterator[tuple[str, Callable[[], Any], Reading]]:
    """Name, a function as transformers makes it, and how to read one; parts before what holds them."""
    from transformers import masking_utils as made

    numbers = torch.tensor([[0, 0, 1, 1, 1, -1, 2, 2], [-1, 0, 0, -1, -1, 1, 1, 1]])
    places = torch.tensor([[0, 1, 0, 1, 2, 0, 0, 1], [0, 0, 1, 0, 1, 0, 1, 2]])
    causal = made.causal_mask_function
    yield "causal", lambda: causal, lambda _, __: Causal()
    yield "bidirectional", lambda: made.bidirectional_mask_function, lambda _, __: EVERYTHING
    yield "window", lambda: made.sliding_window_overlay(3), _window
    yield (
        "surroundings",
        lambda: made.sliding_window_bidirectional_overlay(2),
        _surroundings,
    )
    yield "chunks", lambda: made.chunked_overlay(3, torch.tensor([0, 2])), _chunked
    yield "blocks", lambda: made.blockwise_overlay(numbers), _blocks
    yield "documents", lambda: made.packed_sequence_mask_function(numbers), _documents
    yield "padding", lambda: made.padding_mask_function(numbers > 0), _padding
    yield "offsets", lambda: made.add_offsets_to_mask_function(causal, 2, 1), _shifted
    yield "positions", lambda: made.remap_positions_for_packed_sequence(causal, places), _remapped
    yield "and", lambda: made.and_masks(causal, made.sliding_window_overlay(3)), _and
    yield "or", lambda: made.or_masks(causal, made.blockwise_overlay(numbers)), _or


def _window(held: Variables, _: Recogniser) -> Rule | None:
    size = held["sliding_window"]
    return Window(size) if type(size) is int else None


def _surroundings(held: Variables, _: Recogniser) -> Rule | None:
    size = held["sliding_window"]
    return Surroundings(size) if type(size) is int else None


def _chunked(held: Variables, _: Recogniser) -> Rule | None:
    size, starts = held["chunk_size"], held["left_padding"]
    if type(size) is not int or size < 1 or not _numbers(starts, 1):
        return None
    return Chunked(size, starts, tuple(starts.tolist()))


def _blocks(held: Variables, _: Recogniser) -> Rule | None:
    ids = held["block_sequence_ids"]
    return Alike(ids, blocks=True) if _numbers(ids, 2) else None


def _documents(held: Variables, _: Recogniser) -> Rule | None:
    ids = held["packed_sequence_mask"]
    return Alike(ids) if _numbers(ids, 2) else None


def _padding(held: Variables, _: Recogniser) -> Rule | None:
    real = held["padding_mask"]
    return Padding(real) if isinstance(real, Tensor) and real.dtype == torch.bool else None


def _shifted(held: Variables, inner: Recogniser) -> Rule | None:
    query, key = held["q_offset"], held["kv_offset"]
    if type(query) is not int or type(key) is not int or min(query, key) < 0:
        return None
    return Shifted(inner(held["mask_function"]), query, key)


def _remapped(held: Variables, inner: Recogniser) -> Rule | None:
    positions = held["position_ids"]
    if not _numbers(positions, 2) or bool((positions < 0).any()):
        return None  # what is taken to see everything asks for indices of 0 and more
    return _spread(inner(held["mask_function"]), positions)


def _and(held: Variables, inner: Recogniser) -> Rule:
    rule = both(*map(inner, held["mask_functions"]))
    if not isinstance(rule, And):
        return rule
    documents = [part for part in rule.parts if isinstance(part, Alike)]
    return _plain(rule, documents)


def _or(held: Variables, inner: Recogniser) -> Rule:
    return either(*map(inner, held["mask_functions"]))


def _numbers(tensor: object, dimensions: int) -> bool:
    if not isinstance(tensor, Tensor) or tensor.dim() != dimensions:
        return False
    return not tensor.is_floating_point() and tensor.dtype != torch.bool


def _spread(rule: Rule, positions: Tensor) -> Rule:
    """Ask the parts of a rule with positions, not the whole, so that each can be simplified."""
    if isinstance(rule, Constant):
        return rule
    if isinstance(rule, Composed):
        parts = [_spread(part, positions) for part in rule.parts]
        return both(*parts) if isinstance(rule, And) else either(*parts)
    return Remapped(rule, positions)


def _plain(rule: Rule, documents: list[Alike]) -> Rule:
    """Ask rules about distances with indices again, where documents hold whatever else differs.

    Positions that grow by one inside a document have the distances of indices there, and no pair of
    two documents is visible anyway.
    """
    if isinstance(rule, Composed):
        parts = [_plain(part, documents) for part in rule.parts]
        return both(*parts) if isinstance(rule, And) else either(*parts)
    if not isinstance(rule, Remapped) or not isinstance(rule.rule, Causal | Window | Surroundings):
        return rule
    return rule.rule if any(_grow_by_one(rule.here, d) for d in documents) else rule


def _grow_by_one(positions: Tensor, documents: Alike) -> bool:
    ids = documents.here
    if documents.blocks or ids.shape != positions.shape:
        return False
    step = ids.diff(dim=1)
    # Numbers that come back later would join what lies apart.
    return bool((step >= 0).all() and ((step != 0) | (positions.diff(dim=1) == 1)).all())
