"""Which keys the last token of a prompt sees: what a policy of positions is shown of a mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from core.errors import ModelError


@runtime_checkable
class ReadableMask(Protocol):
    """What a mask that is no tensor may offer, so that policies can read it.

    Example::

        class LazyMask:
            def row(self, rows, last): return self.block(rows, last, slice(None))
    """

    def row(self, rows: Tensor, last: Tensor) -> Tensor:
        """Return (R, Tk), true where query ``last[i]`` of batch row ``rows[i]`` sees a key."""
        ...


def last_real(padding: Tensor | None, query: Tensor) -> Tensor:
    """(B,) index of the last token of each prompt among the queries."""
    batch, length = query.shape[0], query.shape[2]
    steps = torch.arange(length, device=query.device)
    if padding is None:
        return steps[-1:].expand(batch)
    return torch.where(padding[:, :length].to(query.device), steps, 0).amax(dim=1)


def visible(
    module: nn.Module,
    mask: Any,
    padding: Tensor | None,
    last: Tensor,
    count: int,
    kwargs: Mapping[str, Any],
) -> Tensor:
    """(B, Tk) which keys the last token of each prompt sees.

    Args:
        module: the attention module.
        mask: what its mask function returned.
        padding: (B, T) the padding mask of the batch, if there is one.
        last: (B,) from :func:`last_real`.
        count: number of keys.
        kwargs: of the attention function; ``sliding_window`` counts where the mask is not read.

    Raises:
        ModelError: for a mask that cannot be read, in a layer that is not plainly causal.
    """
    steps = torch.arange(count, device=last.device)
    seen = steps <= last.unsqueeze(1)
    rows = torch.arange(last.shape[0], device=last.device)
    if isinstance(mask, Tensor) and mask.dim() == 4:
        shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
        shown = shown.any(dim=1).expand(last.shape[0], -1, -1)
        return seen & shown[rows, last, :count]
    if isinstance(mask, ReadableMask):
        return seen & mask.row(rows, last)[:, :count]
    window = _window(module, mask, kwargs)
    if window is not None:
        seen = seen & (steps > last.unsqueeze(1) - window)
    if padding is not None:
        padded = nn.functional.pad(padding, (0, max(0, count - padding.shape[1])))
        seen = seen & padded[:, :count].to(last.device)
    return seen


def _window(module: nn.Module, mask: Any, kwargs: Mapping[str, Any]) -> int | None:
    window = kwargs.get("sliding_window")
    if window is not None:
        return int(window)
    pattern = "" if mask is None or isinstance(mask, Tensor) else _pattern(module)
    if pattern:
        raise ModelError(
            f"the mask of {type(module).__name__} cannot be read",
            why=f"a policy must know what a token sees; the layer has {pattern}, "
            f"and a {type(mask).__name__} does not tell",
            fix="give the mask the method of core.positions.visible.ReadableMask",
        )
    return None


def _pattern(module: nn.Module) -> str:
    """What the configuration tells of a layer that does not see all keys before it."""
    config: Any = getattr(module, "config", None)
    types, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if types and isinstance(index, int):
        return "" if types[index] == "full_attention" else str(types[index])
    names = ("sliding_window", "attention_chunk_size")
    return next((name for name in names if getattr(config, name, None)), "")
