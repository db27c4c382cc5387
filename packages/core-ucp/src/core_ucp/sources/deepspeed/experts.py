"""Experts of DeepSpeed's own mixtures: numbered anew on every rank, one file per expert."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import count
from typing import TypeVar

from core_ucp.files.pickles import Located
from core_ucp.sources.deepspeed.content import Content
from core_ucp.sources.deepspeed.shares import Share

_NUMBERED = re.compile(r"(.*\.deepspeed_experts\.)(\d+)(\..*)")

V = TypeVar("V")


def is_expert(name: str) -> bool:
    """Whether a name is that of a part of an expert."""
    return _NUMBERED.fullmatch(name) is not None


def renumber(values: Mapping[str, V], rank: int) -> dict[str, V]:
    """Give the experts of a rank their numbers in the whole model.

    Ranks number their experts from zero on. Expert-parallel rank ``r`` holds the ``r``-th of equal
    shares of them, and data-parallel rank ``d`` is expert-parallel rank ``d % ep``.

    Args:
        values: by name on the rank.
        rank: among those that share the experts.
    """
    local = 1 + max((int(m[2]) for m in map(_NUMBERED.fullmatch, values) if m), default=-1)
    return {numbered(name, rank * local): value for name, value in values.items()}


def numbered(name: str, first: int) -> str:
    """A name with its expert's number counted from ``first`` on."""
    found = _NUMBERED.fullmatch(name)
    return f"{found[1]}{int(found[2]) + first}{found[3]}" if found else name


def read_experts(content: Content, mp: int, share: Share) -> None:
    """Add the weights that the files of experts hold.

    Raises:
        CheckpointError: when the file of an expert is missing.
    """
    there = sorted(at for at in content.folder.experts if at[2] == mp)
    for layer in sorted({at[0] for at in there}):
        have = {expert for at, expert, _ in there if at == layer}
        gap = next(expert for expert in count() if expert not in have)
        if gap < max(have):
            raise content.fail(
                "is incomplete", why=f"the file of expert {gap} of layer {layer} is missing"
            )
    for at in there:
        for name, value in content.read(content.folder.experts[at]).items():
            if isinstance(value, Located):
                share.halves[str(name)] = value.atom()
