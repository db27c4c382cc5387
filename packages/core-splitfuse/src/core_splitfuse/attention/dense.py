"""Attention of one sequence's new tokens over all its keys and values."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class Rule(NamedTuple):
    """What a layer asks of its attention.

    Args:
        scaling: factor of the scores.
        window: tokens that a token sees, itself included; ``None`` for all before it.
        softcap: bound that scores approach, by ``softcap * tanh(score / softcap)``.
        sinks: (H,) logit of every head that takes its share of the softmax and gives nothing.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def first_seen(begin: int, window: int | None) -> int:
    """Index of the first key that a token at ``begin``, or any later one, sees."""
    return 0 if window is None else max(0, begin + 1 - window)


Once = Callable[[Hashable, Callable[[], Tensor]], Tensor]
"""Makes what a key names, or has it already."""


def _always(_: Hashable, make: Callable[[], Tensor]) -> Tensor:
    return make()


def attend(
    query: Tensor, key: Tensor, value: Tensor, begin: int, rule: Rule, once: Once = _always
) -> Tensor:
    """Attend causally, within the window.

    Args:
        query: (H, T, D) of the tokens at ``begin``, ``begin + 1``, ...
        key: (Hkv, L, D) of the tokens before the end of the queries, the last L of them.
        value: (Hkv, L, Dv).
        begin: position of the first query.
        rule: the layer's.
        once: keeps masks for the next layer.

    Returns:
        (H, T, Dv)
    """
    offset = begin + query.shape[1] - key.shape[1]  # position of the first key
    if rule.softcap is not None or rule.sinks is not None:
        return _explicit(query, key, value, begin, offset, rule, once)
    if query.shape[1] == 1:
        return _one(query, key, value, rule.scaling)
    length, count, dtype = query.shape[1], key.shape[1], query.dtype
    whole = begin == offset == 0 and (rule.window is None or rule.window >= count)
    mask = None
    if not whole:
        seen = _seen(query, count, begin, offset, rule, once)
        mask = once(
            ("added", length, count, begin, rule.window, dtype),
            lambda: torch.where(seen, 0.0, -torch.inf).to(dtype),
        )
    out: Tensor = scaled_dot_product_attention(
        query.unsqueeze(0),
        key.unsqueeze(0),
        value.unsqueeze(0),
        attn_mask=mask,
        is_causal=whole,
        scale=rule.scaling,
        enable_gqa=query.shape[0] != key.shape[0],
    )
    return out.squeeze(0)


def _seen(query: Tensor, count: int, begin: int, offset: int, rule: Rule, once: Once) -> Tensor:
    return once(
        ("seen", query.shape[1], count, begin, rule.window),
        lambda: visible(query.shape[1], count, begin, offset, rule.window, query.device),
    )


def visible(
    queries: int, keys: int, begin: int, offset: int, window: int | None, device: torch.device
) -> Tensor:
    """(queries, keys) which query sees which key; they begin at ``begin`` and ``offset``."""
    distance = torch.arange(begin, begin + queries, device=device).unsqueeze(1)
    distance = distance - torch.arange(offset, offset + keys, device=device)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _one(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """One token sees all its keys: the heads of a group are queries of one key head."""
    groups = query.reshape(1, key.shape[0], -1, query.shape[2])
    out: Tensor = scaled_dot_product_attention(
        groups, key.unsqueeze(0), value.unsqueeze(0), scale=scaling
    )
    return out.reshape(query.shape[0], 1, value.shape[2])


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, begin: int, offset: int, rule: Rule, once: Once
) -> Tensor:
    heads, length, width = query.shape
    grouped = query.reshape(key.shape[0], -1, width)  # (Hkv, G*T, D)
    scores = (grouped @ key.transpose(1, 2)).float().reshape(heads, length, -1) * rule.scaling
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    seen = _seen(query, key.shape[1], begin, offset, rule, once)
    scores = scores.masked_fill(~seen, -torch.inf)
    if rule.sinks is not None:
        sinks = rule.sinks.float().view(heads, 1, 1).expand(heads, length, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[1]].to(value.dtype)
    out = weights.reshape(key.shape[0], -1, key.shape[1]) @ value
    return out.reshape(heads, length, value.shape[2])
