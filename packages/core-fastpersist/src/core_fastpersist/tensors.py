"""Tensors as the bytes of a file, for writers that get them one by one."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from core.checkpoints.boxes import memory
from core.errors import CheckpointError
from core_fastpersist.direct.pieces import HostBytes, Source
from core_fastpersist.files.sources import LateBytes


def source_of(tensor: Tensor, name: str) -> Source:
    """The elements of a dense tensor in row-major order, from where they lie if they lie so.

    Args:
        tensor: on any device. It must stay as it is until it is written.
        name: what errors call it.

    Raises:
        CheckpointError: for a tensor without plain memory: sparse, quantized, nested, meta.
    """
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        kind = "quantized" if tensor.is_quantized else "meta" if tensor.is_meta else tensor.layout
        raise CheckpointError(
            f"{name!r} cannot be saved",
            why=f"it is {kind}",
            fix="save the dense tensors that it is made of",
        )
    plain = tensor.detach()
    straight = not (plain.is_conj() or plain.is_neg()) and plain.is_contiguous()
    if plain.device.type == "cpu" and straight:
        return HostBytes(memory(plain))
    return LateBytes(plain.resolve_conj().resolve_neg())


class LaterBytes:
    """The elements of a tensor that is made when the first of them is asked for.

    It is dropped with the last one, so that a conversion holds few tensors at once.

    Args:
        name: what errors call the tensor.
        nbytes: how many bytes the elements will have.
        resolve: makes the tensor.
        lock: held while it is made; shared by tensors that cannot be made side by side.
    """

    view: memoryview | None = None

    def __init__(
        self, name: str, nbytes: int, resolve: Callable[[], Tensor], lock: threading.Lock
    ) -> None:
        self.nbytes = nbytes
        self._name = name
        self._resolve = resolve
        self._lock = lock
        self._found: Source | None = None
        self._missing = nbytes

    def copy(self, begin: int, end: int, into: memoryview) -> None:
        with self._lock:
            found = self._found = self._found or source_of(self._resolve(), self._name)
        found.copy(begin, end, into)
        with self._lock:
            self._missing -= end - begin
            if self._missing == 0:
                self._found = None
