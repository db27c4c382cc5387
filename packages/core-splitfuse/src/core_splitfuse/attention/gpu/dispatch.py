"""One door to paged attention: who attends is chosen by what the layer asks for."""

from __future__ import annotations

from torch import Tensor

from core_splitfuse.attention.dense import Rule
from core_splitfuse.attention.gpu import attending, varlen
from core_splitfuse.attention.gpu.plan import Plan
from core_splitfuse.attention.gpu.rotation import Rotation


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: Plan,
    rule: Rule,
    rotation: Rotation | None = None,
) -> Tensor:
    """Attend with the tokens of a pass over what the store holds of their sequences.

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
    if varlen.choose(query, keys, values, rule, rotation).backend == "varlen":
        return varlen.attend(query, keys, values, plan, rule)
    return attending.attend(query, keys, values, plan, rule, rotation)
