"""Launches of the kernels: from queries and a store to the output of a layer."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from core.errors import EngineError
from core_splitfuse.attention.dense import Rule
from core_splitfuse.attention.gpu.atoms import Cut, Kind
from core_splitfuse.attention.gpu.kernel import attend_kernel, merge_kernel
from core_splitfuse.attention.gpu.language import OPTIONS, made_current
from core_splitfuse.attention.gpu.plan import Launch, Plan
from core_splitfuse.attention.gpu.rotation import Rotation
from core_splitfuse.attention.gpu.tiles import (
    Heads,
    Tile,
    device_of,
    for_chunks,
    for_decodes,
    power_of_two,
)
from core_splitfuse.attention.gpu.write import require_store

DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)
"""Of queries and stores."""


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: Plan,
    rule: Rule,
    rotation: Rotation | None = None,
) -> Tensor:
    """Attend with the tokens of a pass over what the store holds of their sequences.

    Adds up in float32 and rounds once at the end; between both products the weights are rounded to
    the dtype of the store, as flash attention does.

    Args:
        query: (T, H, D) of the packed row, in the dtype of the store; float16, bfloat16, float32.
        keys: (blocks, block_size, Hkv, D), without gaps; those of the pass are written already.
        values: (blocks, block_size, Hkv, Dv), without gaps.
        plan: the pass.
        rule: the layer's.
        rotation: for queries and keys that are unrotated.

    Returns:
        (T, H, Dv); zeros for rows that are padding.

    Raises:
        ValueError: for tensors that do not fit together.
        EngineError: for another dtype.
    """
    require_store(keys, values)
    heads = _heads(query, keys, values, rotation)
    if query.shape[0] != plan.tokens or keys.shape[1] != plan.block_size:
        raise ValueError(f"{query.shape[0]} tokens are not the {plan.tokens} of the plan")
    query = query if query.stride(-1) == 1 else query.contiguous()
    out = query.new_empty(query.shape[0], heads.query, heads.value_dim)
    device = device_of(query.device)
    tiles = for_decodes(heads, device), for_chunks(heads, device)
    kind = Kind(_cut(tiles[0], heads, short=True), _cut(tiles[1], heads), rule.window)
    launches = plan.launches(kind)
    with made_current(query):
        for tile, launch in zip(tiles, (launches.decodes, launches.chunks), strict=True):
            if launch.atoms.shape[0]:
                _launch(query, keys, values, out, plan, rule, rotation, heads, tile, launch)
    return out


def _launch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    plan: Plan,
    rule: Rule,
    rotation: Rotation | None,
    heads: Heads,
    tile: Tile,
    launch: Launch,
) -> None:
    shape = launch.parts, heads.query, heads.value_dim
    parts = query.new_empty(shape, dtype=torch.float32)
    weights = query.new_empty(shape[:2], dtype=torch.float32)
    grid = launch.atoms.shape[0], _programs(tile, heads)
    attend_kernel[grid](
        query,
        keys,
        values,
        out,
        parts,
        weights,
        plan.tables,
        launch.atoms,
        # A pointer that the kernel does not read must be one all the same.
        weights if rule.sinks is None else rule.sinks.contiguous(),
        *_turning(rotation, weights),
        float(rule.scaling),
        float(rule.softcap or 1.0),
        rule.window or 0,
        plan.tables.stride(0),
        query.stride(0),
        query.stride(1),
        **constants(heads, tile, rule, rotation, plan.block_size),
        num_warps=tile.warps,
        num_stages=tile.stages,
        **OPTIONS,
    )
    if launch.merges.shape[0]:
        merge_kernel[(launch.merges.shape[0], heads.query)](
            parts,
            weights,
            out,
            launch.merges,
            HEADS=heads.query,
            VALUE_DIM=heads.value_dim,
            VALUE_WIDTH=power_of_two(heads.value_dim),
            **OPTIONS,
        )


def constants(
    heads: Heads, tile: Tile, rule: Rule, rotation: Rotation | None, block_size: int
) -> dict[str, Any]:
    """What the kernel of attention is compiled for."""
    turned = 0 if rotation is None else rotation.turned
    return {
        "GROUP": heads.group,
        "KEY_HEADS": heads.key,
        "DIM": heads.dim,
        "VALUE_DIM": heads.value_dim,
        "BLOCK": block_size,
        "WINDOW": rule.window is not None,
        "SOFTCAP": rule.softcap is not None,
        "SINKS": rule.sinks is not None,
        "TURNED": turned,
        "INTERLEAVED": rotation is not None and rotation.interleaved,
        "RATIOS": rotation is not None and rotation.ratios is not None,
        "ROWS": tile.rows,
        "HEADS": tile.heads,
        "KEYS": tile.keys,
        "PAIRS": power_of_two(max(turned // 2, 16)),
        "WIDTH": power_of_two(max(heads.dim - turned, 16)),
        "VALUE_WIDTH": power_of_two(max(heads.value_dim, 16)),
        # Single precision as it is meant; matrix units would round to ten bits.
        "PRECISION": "ieee" if heads.itemsize > 2 else "tf32",
    }


def _turning(rotation: Rotation | None, unread: Tensor) -> tuple[Tensor, ...]:
    if rotation is None:
        return (unread,) * 4
    ratios = unread if rotation.ratios is None else rotation.ratios.contiguous()
    return rotation.frequencies.contiguous(), rotation.lines, rotation.scales, ratios


def _heads(query: Tensor, keys: Tensor, values: Tensor, rotation: Rotation | None) -> Heads:
    if query.dtype not in DTYPES:
        raise EngineError(
            f"paged attention on GPUs does not compute {query.dtype}",
            fix="load the model in bfloat16, float16 or float32",
        )
    count, dim = query.shape[1:]
    if dim != keys.shape[3] or count % keys.shape[2] or query.dtype != keys.dtype:
        what = f"queries {tuple(query.shape)} of {query.dtype}"
        raise ValueError(f"{what} do not fit keys {tuple(keys.shape)} of {keys.dtype}")
    apart = rotation is not None and rotation.ratios is not None
    return Heads(count, keys.shape[2], dim, values.shape[3], keys.element_size(), apart)


def _programs(tile: Tile, heads: Heads) -> int:
    return heads.key * -(-heads.group // tile.heads)


def _cut(tile: Tile, heads: Heads, *, short: bool = False) -> Cut:
    return Cut(tile.tokens, _programs(tile, heads), short)
