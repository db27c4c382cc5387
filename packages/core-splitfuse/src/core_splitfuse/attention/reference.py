"""Paged attention in plain torch, as one would write it down: what kernels are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from core_splitfuse.attention.dense import Rule


def paged_attention_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    starts: Tensor,
    lengths: Tensor,
    rule: Rule,
    *,
    frequencies: Tensor | None = None,
    scales: Tensor | None = None,
    ratios: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Attend sequence by sequence and head by head, in float64.

    The query in row ``starts[s] + i`` stands at ``lengths[s] - (starts[s + 1] - starts[s]) + i``
    and sees all keys of sequence ``s`` up to its own position, within the window.

    Args:
        query: (T, H, D) packed row.
        keys: (blocks, block_size, Hkv, D).
        values: (blocks, block_size, Hkv, Dv).
        tables: (S, max_blocks) blocks of every sequence, in order.
        starts: (S + 1,) rows.
        lengths: (S,) tokens in the store, those of this pass included.
        rule: scaling, window, softcap and sinks.
        frequencies: (S, R / 2) inverse frequencies, where queries and keys are unrotated.
        scales: (S,) factor of cosines and sines; 1 unless given.
        ratios: (S, H) by which positions are divided; 1 unless given.
        interleaved: whether neighbours are turned with each other, not halves.

    Returns:
        (T, H, Dv) float64; zeros in rows of no sequence.
    """
    out = torch.zeros(*query.shape[:2], values.shape[3], dtype=torch.float64, device=query.device)
    group = query.shape[1] // keys.shape[2]
    for sequence, length in enumerate(lengths.tolist()):
        first, last = int(starts[sequence]), int(starts[sequence + 1])
        blocks = tables[sequence, : -(-length // keys.shape[1])].long()
        own_keys = keys[blocks].flatten(0, 1)[:length].double()
        own_values = values[blocks].flatten(0, 1)[:length].double()
        where = torch.arange(length, device=query.device)
        for head in range(query.shape[1]):
            rows, columns = query[first:last, head].double(), own_keys[:, head // group]
            if frequencies is not None:
                ratio = 1.0 if ratios is None else float(ratios[sequence, head])
                scale = 1.0 if scales is None else float(scales[sequence])
                # Models have their angles in float32: beyond that they mean nothing.
                angles = where[:, None].float() / ratio * frequencies[sequence].float()
                rows = _rotated(rows, angles.double()[length - len(rows) :], scale, interleaved)
                columns = _rotated(columns, angles.double(), scale, interleaved)
            weights = _weights(rows @ columns.T, rule, head, where)
            out[first:last, head] = weights @ own_values[:, head // group]
    return out


def _weights(scores: Tensor, rule: Rule, head: int, where: Tensor) -> Tensor:
    scores = scores * rule.scaling
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    distance = where[len(where) - len(scores) :, None] - where
    hidden = distance < 0
    if rule.window is not None:
        hidden |= distance >= rule.window
    scores = scores.masked_fill(hidden, -torch.inf)
    if rule.sinks is not None:
        sink = rule.sinks[head].double().expand(len(scores), 1)
        return torch.cat([scores, sink], dim=1).softmax(dim=1)[:, :-1]
    return scores.softmax(dim=1)


def _rotated(x: Tensor, angles: Tensor, scale: float, interleaved: bool) -> Tensor:
    turned = 2 * angles.shape[1]
    front, rest = x[:, :turned], x[:, turned:]
    half = turned // 2
    pairs = front.view(len(x), half, 2).mT if interleaved else front.view(len(x), 2, half)
    first, second = pairs.unbind(1)
    cos, sin = angles.cos() * scale, angles.sin() * scale
    parts = torch.stack(
        [first * cos - second * sin, second * cos + first * sin], dim=2 if interleaved else 1
    )
    return torch.cat([parts.flatten(1), rest], dim=1)
