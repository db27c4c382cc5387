"""The output head of a model that is to return lazy logits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from core_fpdt.loss.logits import LazyLogits
from core_fpdt.loss.projection import Projection, bytes_of_loss
from core_fpdt.loss.recording import Recipe
from core_fpdt.settings import FPDTSettings

logger = logging.getLogger("core")


def replace_head(model: nn.Module, settings: FPDTSettings) -> Callable[[], None]:
    """Let the output head return logits that are only computed where they are needed.

    Where logits and their loss fit into ``settings.loss_chunk_bytes``, nothing changes: generation
    and short sequences get plain tensors. A head that is no plain linear module stays as it is, and
    a line in the log says why.

    Args:
        model: a transformers model, with adapters or without.
        settings: its ``loss_chunk_bytes`` counts.

    Returns:
        What puts the head back.

    Example::

        undo = replace_head(model, FPDTSettings(loss_chunk_bytes=2**28))
        model(input_ids=ids, labels=ids).loss.backward()
        undo()
    """
    find = getattr(model, "get_output_embeddings", None)
    head: Any = find() if callable(find) else None
    why = _unfit(head)
    if why:
        logger.info("%s: the loss is not computed in chunks: %s", type(model).__name__, why)
        return lambda: None
    head.forward = partial(_forward, head, settings.loss_chunk_bytes)
    return partial(_put_back, head)


def _put_back(head: nn.Module) -> None:
    vars(head).pop("forward", None)


def _unfit(head: object) -> str:
    if head is None:
        return "it has no output head"
    kind = type(head).__name__
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return f"its output head is a {kind}, not a plain linear module"
    if "forward" in vars(head):
        return "somebody else replaced the forward of its output head"
    return ""


def _forward(head: nn.Linear, limit: int, hidden: Tensor) -> Tensor:
    weight = head.weight
    large = bytes_of_loss(hidden.shape[:-1].numel(), head.out_features, weight.dtype) > limit
    if not large or not _lazy_here(hidden, weight):
        return nn.Linear.forward(head, hidden)
    projection = Projection.of(head, limit)
    _stay_unsharded(head)
    return LazyLogits.of(Recipe(hidden, projection, projection.compute))


def _lazy_here(hidden: Tensor, weight: Tensor) -> bool:
    """Whether these are tensors that can be read later: not sharded, packed or traced ones."""
    plain = type(hidden) is Tensor and type(weight) in {Tensor, nn.Parameter}
    # Of different dtypes without autocast: PyTorch has the words for this error.
    fits = hidden.dtype == weight.dtype or torch.is_autocast_enabled(weight.device.type)
    return plain and fits and hidden.dim() > 1 and not torch.compiler.is_compiling()


def _stay_unsharded(head: nn.Module) -> None:
    """Keep the weights of a head that FSDP2 shards by itself until the loss is known."""
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule

        if isinstance(head, FSDPModule):
            head.set_reshard_after_forward(False, recurse=False)
