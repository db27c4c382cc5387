"""The state that is saved: tensors of the shapes that training a language model has."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

State = dict[str, Tensor]

_SMALLEST, _STEP = 16, 16
_LAYERS = 8
_COPIES = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")


def make_state(size: int, seed: int = 0) -> State:
    """Parameters of a decoder in float32 with the two moments of Adam, filled at random.

    Args:
        size: bytes, met from below to within one matrix of a layer.
        seed: of the random numbers.

    Example:
        >>> state = make_state(2**20)
        >>> 0.8 < sum(tensor.nbytes for tensor in state.values()) / 2**20 <= 1
        True
    """
    generator = torch.Generator().manual_seed(seed)
    width = int(math.sqrt(size / (12 * _LAYERS * 4 * len(_COPIES))))
    width = max(_SMALLEST, width // _STEP * _STEP)
    state: State = {}
    left = size
    for name, shape in _shapes(width):
        bytes_ = math.prod(shape) * 4 * len(_COPIES)
        if bytes_ > left:
            break
        left -= bytes_
        for copy in _COPIES:
            state[f"{copy}.{name}"] = torch.empty(shape).uniform_(generator=generator)
    return state


def total(state: State) -> int:
    """Bytes of a state."""
    return sum(tensor.nbytes for tensor in state.values())


def _shapes(width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Parameters of a decoder with as many layers as one wants."""
    layer = 0
    while True:
        for name, shape in (
            ("attention.norm", (width,)),
            ("attention.qkv", (3 * width, width)),
            ("attention.out", (width, width)),
            ("mlp.norm", (width,)),
            ("mlp.up", (4 * width, width)),
            ("mlp.down", (width, 4 * width)),
        ):
            yield f"layers.{layer}.{name}", shape
        layer += 1
