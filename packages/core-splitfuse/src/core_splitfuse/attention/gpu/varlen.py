"""The attention that torch brings for packed rows, and the choice between it and the own kernels.

``torch.nn.attention.varlen.varlen_attn`` reads keys and values by a block table where one of the
FlashAttention implementations that do so was activated in the process. It knows windows and groups
of heads; it knows neither softcap nor sinks nor keys that are stored unrotated.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from core_splitfuse.attention.dense import Rule
from core_splitfuse.attention.gpu.plan import Plan
from core_splitfuse.attention.gpu.rotation import Rotation

_WIDEST = 256


class Choice(NamedTuple):
    """Which attention serves a layer.

    Args:
        backend: ``triton`` are the own kernels, ``varlen`` is torch.
        reason: why.
    """

    backend: Literal["triton", "varlen"]
    reason: str


def choose(
    query: Tensor, keys: Tensor, values: Tensor, rule: Rule, rotation: Rotation | None = None
) -> Choice:
    """Choose who attends; what :func:`attend` needs, without its plan.

    FlashAttention 3 is asked wherever it can answer: who activates it wants it.

    Example::

        torch.nn.attention.activate_flash_attention_impl("FA3")
        choose(query, keys, values, rule).backend  # "varlen" on compute capability 9.0
    """
    obstacle = _asks_too_much(rule, rotation) or _misfit(query, keys, values) or _inactive(query)
    if obstacle:
        return Choice("triton", f"varlen_attn cannot: {obstacle}")
    return Choice("varlen", "FlashAttention 3 is active")


def attend(query: Tensor, keys: Tensor, values: Tensor, plan: Plan, rule: Rule) -> Tensor:
    """Attend by torch; arguments and result as those of the own kernels."""
    from torch.nn.attention.varlen import varlen_attn

    found = varlen_attn(
        query,
        keys,
        values,
        plan.starts,
        None,
        plan.longest_query,
        plan.longest_key,
        scale=rule.scaling,
        window_size=(-1, 0) if rule.window is None else (rule.window - 1, 0),
        enable_gqa=query.shape[1] != keys.shape[2],
        seqused_k=plan.lengths,
        block_table=plan.tables,
        num_splits=None if plan.spread.split_tokens is None else 1,
    )
    assert isinstance(found, Tensor)
    if plan.room is None:
        return found
    # Nobody writes the rows of padding.
    return found.masked_fill((plan.slots < 0)[:, None, None], 0)


def _asks_too_much(rule: Rule, rotation: Rotation | None) -> str | None:
    if rule.softcap is not None:
        return "scores are capped"
    if rule.sinks is not None:
        return "there are sinks"
    return None if rotation is None else "keys are stored unrotated"


def _misfit(query: Tensor, keys: Tensor, values: Tensor) -> str | None:
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"numbers are {query.dtype}"
    if keys.shape[3] != values.shape[3]:
        return f"keys have {keys.shape[3]} dimensions, values {values.shape[3]}"
    if keys.shape[3] % 8 or keys.shape[3] > _WIDEST:
        return f"heads have {keys.shape[3]} dimensions"
    return None


def _inactive(query: Tensor) -> str | None:
    from torch.nn.attention import current_flash_attention_impl

    if not query.is_cuda:
        return "there is no CUDA device"
    active = current_flash_attention_impl()
    if active != "FA3":
        return f"{active or 'FlashAttention 2'} is active, and block tables need FlashAttention 3"
    return None
