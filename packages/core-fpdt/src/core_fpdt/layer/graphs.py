"""What belongs to a graph of autograd: gradients of gradients are refused, hooks see one gradient."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from core.errors import ModelError


def refuse_graph(what: str) -> None:
    """Refuse, in a backward pass, to become part of a graph: ``create_graph`` was asked for.

    PyTorch's ``once_differentiable`` would let second derivatives go missing without a word.

    Raises:
        ModelError: where gradients of gradients are wanted.
    """
    if torch.is_grad_enabled():
        fix = "leave create_graph out, or compute this part without core-fpdt"
        raise ModelError(f"gradients of gradients are not available through {what}", fix=fix)


@contextmanager
def unhooked(parameters: Iterable[Tensor]) -> Generator[None]:
    """Take the hooks off parameters: theirs is the whole gradient, not that of a chunk or a probe."""
    tables: list[dict[int, Any]] = [getattr(p, "_backward_hooks", None) or {} for p in parameters]
    hooked = [(table, dict(table)) for table in tables if table]
    for live, _ in hooked:
        live.clear()
    try:
        yield
    finally:
        for live, hooks in hooked:
            live.update(hooks)
