"""Rules of a call that sees a part of a sequence, for the whole sequence that ranks share."""

from __future__ import annotations

import torch
from torch import Tensor

from core.errors import ModelError
from core_fpdt.masks.composed import And, Or, both, either
from core_fpdt.masks.evaluated import Unknown
from core_fpdt.masks.held import Alike, Padding, Remapped
from core_fpdt.masks.rules import (
    EVERYTHING,
    NOTHING,
    Causal,
    Chunked,
    Constant,
    Rule,
    Surroundings,
    Window,
)


def shared(rule: Rule, documents: Tensor) -> Rule:
    """Make the rule of a whole sequence of documents from that of a call with a part of it.

    Causality and windows ask for distances, which indices of the whole sequence have too. Chunks are
    counted from the start of each document, as transformers does. What the call says of its own
    tokens must be nothing: the documents say it for all of them.

    Args:
        rule: as recognised in the call.
        documents: (B, S) number of each token's document, -1 for padding.

    Raises:
        ModelError: for a rule that cannot be asked about other tokens than those of the call.
    """
    return both(_spread(rule, documents), Alike(documents, blocks=True))


def _spread(rule: Rule, documents: Tensor) -> Rule:
    match rule:
        case And():
            return both(*(_spread(part, documents) for part in rule.parts))
        case Or():
            return either(*(_spread(part, documents) for part in rule.parts))
        case Constant() | Causal() | Window() | Surroundings():
            return rule
        case Chunked() if not any(rule.begins):
            starts = torch.zeros(len(documents), dtype=torch.long, device=documents.device)
            counted = Chunked(rule.size, starts, (0,) * len(documents))
            return Remapped(counted, _positions(documents))
        case Padding() if bool(rule.here.all()):
            return EVERYTHING
        case Alike(blocks=True) if bool((rule.here < 0).all()):
            return NOTHING
        case Alike(blocks=False) if bool((rule.here == rule.here[:, :1]).all()):
            return EVERYTHING
        case _:
            raise _refused(rule)


def _positions(documents: Tensor) -> Tensor:
    """(B, S) how many tokens of its document come before each one."""
    indices = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = documents.diff(dim=1, prepend=documents[:, :1] - 1) != 0
    return indices - indices.masked_fill(~begins, 0).cummax(1).values


def _refused(rule: Rule) -> ModelError:
    fix = "give the batch without it, or train without sharing sequences"
    match rule:
        case Padding() | Chunked():
            why = "its attention mask hides tokens; padding belongs into the documents"
        case Alike(blocks=False) | Remapped():
            why = "its position ids restart; what is packed belongs into the documents"
        case Alike():
            why = "it has blocks that see ahead, and each rank knows its own tokens' only"
        case Unknown():
            name = getattr(rule.function, "__qualname__", type(rule.function).__name__)
            why = f"what {name!r} says of other tokens than those of the call is not known"
        case _:
            why = f"a mask of the kind {type(rule).__name__} is bound to the tokens of the call"
    return ModelError("the mask of a sequence that ranks share cannot be made", why=why, fix=fix)
