"""The chunk that a layer is being run on, and what its attention does meanwhile."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from core_fpdt.kernels.contract import Scores


class Inputs(NamedTuple):
    """What an attention module hands over for one chunk of this rank.

    Args:
        query: (B, H, c, D).
        key: (B, Hkv, c, D).
        value: (B, Hkv, c, Dv).
        scores: how scores are made.
        sinks: (H,) a score beside those of the keys, where the model has one.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scores: Scores
    sinks: Tensor | None


class Attending(Protocol):
    """What attention is replaced by while a chunk runs: returns (B, H, c, Dv)."""

    def __call__(self, index: int, inputs: Inputs) -> Tensor:
        """Attend with chunk ``index``."""
        ...


@dataclass
class Step:
    """One chunk on its way through the layer.

    Args:
        index: number of the chunk.
        attending: what attention does.
        mask: what the layer is given as its mask.
        rotated: a policy of positions rotates queries and keys, and must be told where they stand.
        module: the attention module, once it was called.
    """

    index: int
    attending: Attending
    mask: object = None
    rotated: bool = False
    module: nn.Module | None = None


class Reached(Exception):  # noqa: N818 - it is no error: the rest of the layer is not wanted
    """Ends the run of a layer at its attention.

    Args:
        inputs: what attention was called with.
    """

    def __init__(self, inputs: Inputs) -> None:
        super().__init__("attention was reached")
        self.inputs = inputs


_step: ContextVar[Step | None] = ContextVar("core_fpdt_step", default=None)


def current() -> Step | None:
    """The step in force, if a chunk is being run."""
    return _step.get()


@contextmanager
def in_force(step: Step) -> Generator[None]:
    """Put a step in force for the layer that is called inside the ``with`` block."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)
