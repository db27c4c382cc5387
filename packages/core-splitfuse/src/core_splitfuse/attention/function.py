"""The attention function that the model calls: it knows the pass in force, and keeps what it gets.

Registered once with transformers' AttentionInterface. The engine puts a pass in force, calls the
model, and every layer comes here with its queries, keys and values of the packed row.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from core.attention import refuse_unknown, register_attention
from core.errors import ModelError
from core_splitfuse.attention.dense import Rule
from core_splitfuse.attention.rotating import Turning
from core_splitfuse.attention.spans import Ragged
from core_splitfuse.attention.store import Store

NAME = "core_splitfuse"
"""Registered name of the attention function."""

_HONOURED = frozenset({"scaling", "sliding_window", "softcap", "s_aux"})


@dataclass(frozen=True)
class Work:
    """What layers have to know of the pass in force.

    Args:
        ragged: its tokens.
        store: keys and values.
        turning: how queries and keys are rotated, where the model does not do it.
    """

    ragged: Ragged
    store: Store
    turning: Turning | None = None


_work: ContextVar[Work | None] = ContextVar("core_splitfuse_work", default=None)


def register() -> None:
    """Register the attention function with transformers; doing it again changes nothing."""
    register_attention(NAME, attend, no_mask, rotates=True)


@contextmanager
def in_force(work: Work) -> Generator[None]:
    """Put a pass in force for the model that is called inside the ``with`` block."""
    token = _work.set(work)
    try:
        yield
    finally:
        _work.reset(token)


def no_mask(*_: Any, **__: Any) -> None:
    """Mask function: who sees whom follows from the pass."""


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Store the keys and values of a layer, and attend.

    Args:
        module: the attention module.
        query: (1, H, T, D) of the packed row.
        key: (1, Hkv, T, D).
        value: (1, Hkv, T, Dv).
        mask: nothing.
        kwargs: ``scaling``, ``sliding_window``, ``softcap`` and ``s_aux`` are honoured.

    Returns:
        (1, T, H, Dv), and no weights.

    Raises:
        ModelError: outside of a pass, and for arguments that are not honoured.
    """
    work = _work.get()
    name = type(module).__name__
    if work is None:
        raise ModelError(f"{name} was called outside of an engine's pass")
    refuse_unknown(module, kwargs, _HONOURED)
    if mask is not None:
        raise ModelError(f"{name} brings a mask of its own, which a packed pass cannot heed")
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise ModelError(f"{name} does not tell which layer it is (layer_idx)")
    rule = Rule(
        scaling=kwargs.get("scaling") or query.shape[-1] ** -0.5,
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    query, key, value = query.squeeze(0), key.squeeze(0), value.squeeze(0)
    if work.turning is None:
        work.store.write(layer, key, value, work.ragged)
        return work.store.attend(layer, query, work.ragged, rule).unsqueeze(0), None
    out = work.turning.attend(module, layer, query, key, value, work, rule)
    return out.unsqueeze(0), None
