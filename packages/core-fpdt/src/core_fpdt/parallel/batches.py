"""What a batch of whole sequences says: tokens, targets, positions and documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from core.errors import DataError

IGNORED = -100
"""Label of a token that is not learnt, as everywhere in transformers."""

_PLANNED = frozenset({"labels", "shift_labels", "position_ids", "attention_mask"})
_COUNT = "num_items_in_batch"


@dataclass(frozen=True)
class Batch:
    """A batch of whole sequences, read as a model of transformers reads it.

    Args:
        along: what runs along the sequence, by name: (B or 1, S, ...).
        rest: everything else.
        targets: (B, S) the token to predict at each place, if there are labels.
        positions: (B or 1, S).
        documents: (B, S) int32 number of the document of each token in its row; -1 is padding.
        count: ``num_items_in_batch`` of the caller.
    """

    along: Mapping[str, Tensor]
    rest: Mapping[str, Any]
    targets: Tensor | None
    positions: Tensor
    documents: Tensor
    count: float | None

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return self.documents.shape[0]

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.documents.shape[1]

    @property
    def learnt(self) -> int:
        """Number of tokens with a label."""
        return 0 if self.targets is None else int((self.targets != IGNORED).sum())


def lengthened(batch: Batch, tokens: int) -> Batch:
    """Add tokens of padding at the end: no real token sees them, and they predict nothing."""
    targets = batch.targets
    return replace(
        batch,
        along={name: _padded(tensor, tokens) for name, tensor in batch.along.items()},
        targets=None if targets is None else _padded(targets, tokens, IGNORED),
        positions=_padded(batch.positions, tokens),
        documents=_padded(batch.documents, tokens, -1),
    )


def read_batch(batch: Mapping[str, Any]) -> Batch:
    """Read a batch as a model would that is given all of it.

    Rows are packed where position ids start again and there is no attention mask: transformers looks
    for documents in no other case. Labels are not kept from crossing into the next document either;
    collators set the first label of a document to -100.

    Args:
        batch: named tensors: ``input_ids`` (B, S) or ``inputs_embeds`` (B, S, H), and what else the
            model is given; a tensor whose second dimension is S runs along the sequence.

    Raises:
        DataError: for tensors that do not fit together.
    """
    tokens = _tokens(batch)
    rows, length = tokens.shape[:2]
    mask = _planned(batch, "attention_mask", rows, length)
    positions = _planned(batch, "position_ids", rows, length)
    if positions is None:
        positions = torch.arange(length, device=tokens.device).unsqueeze(0)
    others = {n: v for n, v in batch.items() if n not in _PLANNED and n != _COUNT}
    along = {n: v for n, v in others.items() if _runs_along(v, rows, length)}
    targets = _targets(batch, rows, length)
    documents = _documents(mask, positions, rows)
    if targets is not None:
        _require_no_padding_to_learn(targets, documents)
    return Batch(
        along=along,
        rest={n: v for n, v in others.items() if n not in along},
        targets=targets,
        positions=positions,
        documents=documents,
        count=_count(batch.get(_COUNT)),
    )


def _padded(tensor: Tensor, tokens: int, value: int = 0) -> Tensor:
    within = [0, 0] * (tensor.dim() - 2)
    return functional.pad(tensor, [*within, 0, tokens], value=value)


def _tokens(batch: Mapping[str, Any]) -> Tensor:
    tokens = batch.get("input_ids")
    dims = 2
    if tokens is None:
        tokens, dims = batch.get("inputs_embeds"), 3
    if not isinstance(tokens, Tensor) or tokens.dim() != dims or 0 in tokens.shape[:2]:
        shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise DataError(
            "the batch has no sequences to share",
            why=f"its input_ids or inputs_embeds are {shape}",
            fix="give whole sequences, (rows, tokens), with at least one token",
        )
    return tokens


def _planned(batch: Mapping[str, Any], name: str, rows: int, length: int) -> Tensor | None:
    """A (B or 1, S) tensor of the batch, if it is there."""
    value = batch.get(name)
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dim() != 2 or not _runs_along(value, rows, length):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise DataError(
            f"{name} does not fit to {rows} sequences of {length} tokens",
            why=f"it is {shape}",
            fix=f"give it as ({rows}, {length}), or leave it out",
        )
    return value


def _runs_along(value: Any, rows: int, length: int) -> bool:
    if not isinstance(value, Tensor) or value.dim() < 2:
        return False
    return value.shape[0] in (1, rows) and value.shape[1] == length


def _targets(batch: Mapping[str, Any], rows: int, length: int) -> Tensor | None:
    """What each place has to predict; shifted as ``ForCausalLMLoss`` does it."""
    shifted = _planned(batch, "shift_labels", rows, length)
    labels = _planned(batch, "labels", rows, length)
    if shifted is not None or labels is None:
        return shifted
    return functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]


def _documents(mask: Tensor | None, positions: Tensor, rows: int) -> Tensor:
    if mask is not None:
        documents = mask.ne(0).int() - 1
    else:
        jumps = positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1
        documents = jumps.cumsum(1, dtype=torch.int32)
    return documents.expand(rows, -1)


def _require_no_padding_to_learn(targets: Tensor, documents: Tensor) -> None:
    """Padding behind a real token sees it in a model of transformers, but nothing on shared sequences."""
    real = documents >= 0
    seeing = ~real & (real.cumsum(1) > 0)
    learnt = int((seeing.to(targets.device) & (targets != IGNORED)).sum())
    if learnt:
        raise DataError(
            f"{learnt} tokens of padding have something to predict",
            why="ranks that share sequences compute nothing for padding behind real tokens",
            fix="set labels of padding, and of the token behind it, to -100",
        )


def _count(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, Tensor) and value.numel() != 1:
        raise DataError("num_items_in_batch is not one number", why=f"it is {tuple(value.shape)}")
    count = float(value)
    if not count > 0:
        raise DataError(f"num_items_in_batch is {count:g}", fix="leave it out: it is counted here")
    return count
