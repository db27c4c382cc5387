"""What of a model must be as it was before an engine was built on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core.testing import tiny


def state_of(model: Any) -> dict[str, object]:
    """Everything but numbers that an engine may have changed, by what to call it."""
    return {
        "the parameters": {n: (p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()},
        "the modules": {n: (type(m), m.forward.__func__) for n, m in model.named_modules()},
        "training mode": {n: m.training for n, m in model.named_modules()},
        "the attention": model.config._attn_implementation,
        "hooks": {n: _hooks(m) for n, m in model.named_modules()},
    }


def logits_of(model: Any) -> Tensor:
    """Logits of a fixed batch, in the mode that the model is in."""
    with torch.no_grad():
        result: Tensor = model(tiny.batch()["input_ids"], use_cache=False).logits
    return result


def overwrite(model: nn.Module, other: nn.Module) -> None:
    """Write the weights of another model into this one, in place."""
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)


def _hooks(module: Any) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)
