"""The attention function and the mask function that an enabled model calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core.attention import refuse_unknown, register_attention
from core.errors import ModelError
from core.softmax import attend as attend_plainly
from core_fpdt.kernels.casting import same_dtype
from core_fpdt.kernels.choosing import choose
from core_fpdt.kernels.contract import Scores
from core_fpdt.kernels.merging import accumulate
from core_fpdt.kernels.sinks import apply_sinks
from core_fpdt.layer.sequence import documents_in_force
from core_fpdt.layer.step import Inputs, current
from core_fpdt.masks.lazy import LazyMask, lazy_mask

NAME = "core_fpdt"
"""Registered name of the attention function."""

# The mask holds the window.
_HONOURED = frozenset({"scaling", "sliding_window", "softcap", "s_aux"})


def register() -> None:
    """Register both functions with transformers; doing it again changes nothing."""
    register_attention(NAME, attend, mask_of)


def mask_of(*args: Any, **kwargs: Any) -> LazyMask:
    """Mask function: as ``transformers.masking_utils.sdpa_mask``, but nothing is evaluated yet."""
    given = kwargs.get("attention_mask")
    if isinstance(given, LazyMask):
        # Models of text and images make the mask outside of the decoder, which is to use it as it is.
        return given
    mask = lazy_mask(*args, **kwargs)
    documents = documents_in_force()
    return mask if documents is None else mask.with_documents(documents)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend with the chunk that is being run; or plainly, while the model generates.

    Args:
        module: the attention module.
        query: (B, H, T, D).
        key: (B, Hkv, Tk, D).
        value: (B, Hkv, Tk, Dv).
        mask: a lazy mask, a 4D tensor that the user made, or ``None`` for a causal one.
        kwargs: ``scaling``, ``sliding_window``, ``softcap`` and ``s_aux`` are honoured.

    Returns:
        (B, T, H, Dv), and no weights.

    Raises:
        ModelError: for arguments that are not honoured, and for a layer in training whose chunks are
            not run here.
    """
    refuse_unknown(module, kwargs, _HONOURED)
    scale = kwargs.get("scaling")
    scores = Scores(query.shape[-1] ** -0.5 if scale is None else scale, kwargs.get("softcap"))
    inputs = Inputs(*same_dtype(query, key, value), scores, kwargs.get("s_aux"))
    step = current()
    if step is not None:
        if step.module is not None:
            why = f"it attends more than once ({type(step.module).__name__}, then again)"
            raise ModelError(f"{type(module).__name__} cannot be run in chunks", why=why)
        step.module = module
        if mask is not step.mask:
            why = "its attention is not given the mask that the layer was"
            raise ModelError(f"{type(module).__name__} cannot be run in chunks", why=why)
        places = kwargs.get("position_ids")
        told = isinstance(places, Tensor) and places.shape[-1] == query.shape[2]
        if step.rotated and not told:
            why = "a policy of positions is in force, and it is not told where its tokens stand"
            raise ModelError(f"{type(module).__name__} cannot be run in chunks", why=why)
        # What kernels make wider than their inputs is not to be cast again.
        with torch.autocast(query.device.type, enabled=False):
            output = step.attending(step.index, inputs)
    elif module.training and torch.is_grad_enabled():
        why = "something else took over the layers, such as gradient checkpointing"
        fix = "leave that off: chunks save more"
        raise ModelError(f"{type(module).__name__} was not run in chunks", why=why, fix=fix)
    else:
        with torch.autocast(query.device.type, enabled=False):
            output = _outside(module, inputs, mask)
    return output.transpose(1, 2).contiguous(), None


def _outside(module: nn.Module, inputs: Inputs, mask: Any) -> Tensor:
    """Attend with whole tensors: steps of generation, and whatever has a cache."""
    lazy = as_lazy(mask, module, inputs.query, inputs.key)
    query, key, value, scores, sinks = inputs
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs[:3]):
        if sinks is not None or scores.softcap is not None:
            why = "it has a cache, and attention with sinks or capped scores has no graph then"
            raise ModelError(f"no gradient through {type(module).__name__}", why=why)
        part = attend_plainly(query, key, value, mask=lazy.dense(), scale=scores.scale)
        return part.output.to(query.dtype)
    tile = lazy.tile(lazy.queries, lazy.keys)
    kernel = choose("auto", query.device, query.dtype)(query, key, value, tile, scores)
    part = accumulate(kernel, None, query, key, value, tile, scores)
    return (part if sinks is None else apply_sinks(part, sinks)).output.to(query.dtype)


def as_lazy(mask: Any, module: nn.Module, query: Tensor, key: Tensor) -> LazyMask:
    """Whatever a model hands over as its mask, as a lazy one.

    Raises:
        ModelError: for something that is no mask.
    """
    if isinstance(mask, LazyMask):
        return mask
    if isinstance(mask, Tensor):
        return LazyMask.of(mask)
    if mask is None and getattr(module, "is_causal", True):
        length = key.shape[2]
        offset = length - query.shape[2]
        return lazy_mask(query.shape[0], query.shape[2], length, offset, device=query.device)
    why = f"its mask is a {type(mask).__name__}"
    raise ModelError(f"{type(module).__name__} cannot be run in chunks", why=why)
