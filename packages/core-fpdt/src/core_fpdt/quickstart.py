"""The step of this package in core's quickstart: longer sequences in the memory of short ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from core import Row
from core.errors import DataError, ModelError
from core_fpdt.enabling import enable
from core_fpdt.measuring.meter import Meter
from core_fpdt.settings import FPDTSettings

if TYPE_CHECKING:
    from core import Run
    from core.recipes.quickstart import Tour

SHORT = 512
"""Tokens of a sequence in the plain way."""
TIMES = 8
"""How many times longer ours is."""
CHUNK = 256
STEPS = 3
_LOSS_CHUNK = 2 * 2**20
_RATE = 3e-4
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class _Trained:
    """What a training took and gave.

    Args:
        device: bytes at most on the device: weights, gradients and all tensors in between.
        host: bytes at most of chunks that wait elsewhere.
        loss: after it, on held-out text as one long sequence.
    """

    device: int
    host: int
    loss: float


def longer_sequences(run: Run, tour: Tour) -> Iterator[Row]:
    """Train two copies of the model on as many tokens: in short sequences, and in one that is longer.

    Raises:
        ModelError: when chunks change the gradients, or take more memory than the plain way.
        DataError: when there is too little text.
    """
    long = SHORT * TIMES
    batches = _tokens(tour.data.training, STEPS * long).view(STEPS, 1, long).to(run.device)
    held_out = tour.data.held_out.flatten()[:long].view(1, -1).to(run.device)
    plain = copy.deepcopy(tour.model).train()
    ours = copy.deepcopy(plain)
    with enable(ours, _settings(run, tour)):
        yield _equal(ours, plain, batches[0, :, : 2 * SHORT])
        before = _loss(plain, held_out)
        short = _train(plain, batches.view(STEPS, TIMES, SHORT), held_out)
        longer = _train(ours, batches, held_out)
    yield _memory(longer, short)
    yield Row(
        what=f"held-out loss over {held_out.numel()} tokens",
        ours=f"{longer.loss:.3f}",
        plain=f"{short.loss:.3f}",
        note=f"{before:.3f} before; both saw the same {batches.numel()} tokens in {STEPS} steps",
    )


def _settings(run: Run, tour: Tour) -> FPDTSettings:
    """Those of the run, with chunks that suit such short sequences."""
    wanted = run.settings(FPDTSettings)
    if wanted.offload == "auto" and run.device.type == "cpu":
        # Memory of the host is what is measured here, so chunks wait on the disk.
        wanted = replace(wanted, offload="file", folder=wanted.folder or str(tour.folder))
    return replace(wanted, chunk_tokens=CHUNK, loss_chunk_bytes=_LOSS_CHUNK)


def _tokens(sequences: Tensor, count: int) -> Tensor:
    if sequences.numel() < count:
        what = f"{count} tokens in a row are needed, and there are {sequences.numel()}"
        raise DataError(what, fix="train on more text (train.text_limit, train.evaluate_sequences)")
    return sequences.flatten()[:count]


def _equal(ours: nn.Module, plain: nn.Module, ids: Tensor) -> Row:
    found, wanted = _gradients(ours, ids), _gradients(plain, ids)
    worst = max(
        float((found[name] - tensor).norm() / tensor.norm().clamp_min(1e-12))
        for name, tensor in wanted.items()
    )
    if not worst <= _TOLERANCE:
        raise ModelError(
            "chunks change the gradients of the model",
            why=f"by {worst:.3g} of their size, where {_TOLERANCE:g} is let pass",
        )
    return Row(
        what=f"largest difference of a gradient, {ids.shape[1]} tokens",
        ours=f"{worst:.1e}",
        note=f"relative, over {len(wanted)} parameters; {ids.shape[1] // CHUNK} chunks",
    )


def _gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    _forward(model, ids).backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _train(model: nn.Module, batches: Tensor, held_out: Tensor) -> _Trained:
    """Train on (steps, sequences, tokens), one sequence at a time; the first step is measured."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE)
    meter = Meter(model)
    with meter:
        _backward(model, batches[0])
    optimizer.step()
    for batch in batches[1:]:
        _backward(model, batch)
        optimizer.step()
    return _Trained(meter.device_peak, meter.host_peak, _loss(model, held_out))


def _backward(model: nn.Module, batch: Tensor) -> None:
    model.zero_grad()
    for ids in batch:
        (_forward(model, ids[None]) / len(batch)).backward()  # type: ignore[no-untyped-call]


def _forward(model: Any, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def _loss(model: nn.Module, ids: Tensor) -> float:
    with torch.no_grad():
        return float(_forward(model, ids))


def _memory(ours: _Trained, plain: _Trained) -> Row:
    if ours.device > plain.device:
        raise ModelError(
            f"{TIMES} times longer sequences do not fit into the memory of the plain way",
            why=f"they take {_size(ours.device)}, and the plain way {_size(plain.device)}",
        )
    return Row(
        what="tokens in a sequence",
        ours=f"{SHORT * TIMES} in {_size(ours.device)}, {TIMES}x",
        plain=f"{SHORT} in {_size(plain.device)}",
        note="weights, gradients and all live tensors of a training step; "
        f"{_size(ours.host)} of chunks wait elsewhere, {CHUNK} tokens in each",
    )


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
