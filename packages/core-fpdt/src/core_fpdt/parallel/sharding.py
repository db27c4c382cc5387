"""A batch of whole sequences, cut for one of the ranks that share them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core.errors import DataError
from core_fpdt.layer.sequence import DOCUMENTS
from core_fpdt.parallel.batches import Batch, lengthened, read_batch
from core_fpdt.parallel.mesh import Peers
from core_fpdt.parallel.placement import Placement

# What ranks compare: numbers that are told as they are, then digests.
_NUMBERS = ("rows", "tokens", "chunk tokens")
_DIGESTS = ("inputs", "labels", "positions", "documents or padding", "num_items_in_batch")
_COMPARED = (*_NUMBERS, *_DIGESTS)


def shard(batch: Mapping[str, Any], chunk: int, peers: Peers) -> dict[str, Any]:
    """Cut a batch for this rank; all ranks call it together, those of one group with the same batch.

    The mean over ranks of what models return as their loss is the loss of the whole batch, and so are
    gradients that DDP or FSDP average: every token with a label counts the same, on whatever rank it
    is, and a rank without any contributes 0. ``num_items_in_batch`` of the caller (as the ``Trainer``
    counts it, over the whole sequences) divides the sum over all tokens of a sequence as it would on
    one rank; otherwise tokens are counted here, over all ranks that average their gradients. A batch
    in which nothing has a label has the loss 0.

    Positions count from 0 in every row unless the batch has ``position_ids``. A family that counts them
    from the attention mask instead (OPT, BioGPT) has to be given them with padding on the left.

    Where the last chunk has fewer tokens than there are ranks it is filled up with padding: models
    cannot be run on no tokens at all.

    Args:
        batch: named tensors of whole sequences; see :func:`read_batch`.
        chunk: tokens in a chunk, over all ranks.
        peers: the ranks.

    Returns:
        What the model takes for this rank's tokens: everything that runs along the sequence, cut;
        ``position_ids`` of the whole sequence; an ``attention_mask`` of ones, so that the jumps
        between chunks are not taken for documents; ``labels``, already shifted, also as
        ``shift_labels``, and ``num_items_in_batch``; and ``fpdt_documents``, (B, S) int32 of the whole
        sequence, -1 at padding, also at that which was added.

    Raises:
        DataError: on all ranks, when one cannot read its batch, the ranks of a group have different
            ones, or a chunk has fewer tokens than there are ranks.
    """
    whole, failure, facts = None, None, [0.0] * len(_COMPARED)
    try:
        whole = read_batch(batch)
        _require_room(chunk, peers)
        facts = _facts(whole, chunk)
    except Exception as error:
        failure = error
    learnt = 0 if whole is None else whole.learnt
    own = [float(dist.get_rank()), float(failure is not None), float(learnt), *facts]
    everyone = peers.gather(torch.tensor(own, dtype=torch.float64))
    if failure is not None:
        raise failure
    _require_readable(everyone)
    _require_same(everyone)
    assert whole is not None
    tokens = max(1.0, float(everyone[:, 0, 2].sum())) / peers.averaged
    last = whole.length % chunk
    if 0 < last < peers.size:
        whole = lengthened(whole, peers.size - last)
    return _cut(whole, Placement.regular(whole.length, chunk, peers.size), peers, tokens)


def _cut(whole: Batch, placement: Placement, peers: Peers, tokens: float) -> dict[str, Any]:
    device = whole.documents.device
    own = placement.indices(peers.rank).to(device)
    cut: dict[str, Any] = dict(whole.rest)
    for name, tensor in whole.along.items():
        cut[name] = tensor.index_select(1, own.to(tensor.device))
    cut["position_ids"] = whole.positions.index_select(1, own)
    cut["attention_mask"] = torch.ones((whole.rows, len(own)), dtype=torch.long, device=device)
    cut[DOCUMENTS] = whole.documents
    if whole.targets is not None:
        targets = whole.targets.index_select(1, own.to(whole.targets.device))
        cut |= {"labels": targets, "shift_labels": targets}
        if whole.count is not None:
            tokens = whole.count / peers.size
        cut["num_items_in_batch"] = torch.tensor(tokens, device=targets.device)
    return cut


def _require_room(chunk: int, peers: Peers) -> None:
    if chunk < peers.size:
        raise DataError(
            f"{peers.size} ranks cannot share chunks of {chunk} tokens",
            why="each has at least one token of every chunk",
            fix="set fpdt.chunk_tokens higher, to some thousands",
        )


def _facts(whole: Batch, chunk: int) -> list[float]:
    """What the ranks of a group must have in common, in the order of ``_COMPARED``."""
    others = (whole.along[name] for name in sorted(whole.along))
    digests = [
        _digest(*others, names=sorted([*whole.along, *whole.rest])),
        _digest(whole.targets),
        _digest(whole.positions),
        _digest(whole.documents),
        float(zlib.crc32(struct.pack("d", whole.count or 0.0))),
    ]
    return [float(whole.rows), float(whole.length), float(chunk), *digests]


def _digest(*tensors: Tensor | None, names: list[str] | None = None) -> float:
    """A checksum; 32 bits, which a double holds exactly."""
    found = zlib.crc32(repr(names).encode())
    for tensor in tensors:
        if tensor is None:
            continue
        found = zlib.crc32(repr((tuple(tensor.shape), tensor.dtype)).encode(), found)
        content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        found = zlib.crc32(content.numpy().data, found)
    return float(found)


def _require_readable(everyone: Tensor) -> None:
    failed = everyone[:, :, 1].nonzero()
    if len(failed):
        group, peer = failed[0].tolist()
        rank = int(everyone[group, peer, 0])
        why = "its batch cannot be shared"
        raise DataError(f"rank {rank} has failed", why=why, fix=f"see what rank {rank} says")


def _require_same(everyone: Tensor) -> None:
    """Refuse, on all ranks, groups whose ranks differ; names the first rank that does."""
    for group in everyone:
        first, compared = group[0], group[:, 3:]
        differing = (compared != first[3:]).any(1).nonzero()
        if len(differing):
            other = group[int(differing[0])]
            raise DataError(
                f"ranks {int(first[0])} and {int(other[0])} share sequences, but differ",
                why=_difference(first[3:].tolist(), other[3:].tolist()),
                fix="give all ranks of a group the same whole sequences, and the same chunk_tokens",
            )


def _difference(first: list[float], other: list[float]) -> str:
    pairs = zip(_COMPARED, first, other, strict=True)
    return ", ".join(
        f"{name} {one:g} and {two:g}" if name in _NUMBERS else f"other {name}"
        for name, one, two in pairs
        if one != two
    )
