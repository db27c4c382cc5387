"""The staging area: one aligned arena that copies of tensors go into, kept between checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from core_fastpersist.dcp.audit import local
from core_fastpersist.direct.memory import PAGE
from core_fastpersist.direct.remote import SharedArena

logger = logging.getLogger("core_fastpersist")
_LARGE = 32 * 2**10
_SMALL_ALIGNMENT = 64


class StagingArea:
    """Copies of tensors in memory that a writer process can map, page by page.

    Large copies begin at a page, so that direct I/O takes them from here. With CUDA the memory is
    page-locked, and copies run on a stream of their own.
    """

    def __init__(self) -> None:
        self.shared: SharedArena | None = None
        self._pinned = False
        self._stream: Any = None

    def copy(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        """Copy tensors into the area, over what was there before.

        Returns:
            the copies by name, on the CPU, sharded as the originals; and a CUDA event after which
            they are complete, or ``None`` when they are.
        """
        places, size = _lay_out(tensors)
        self._make_room(size, any(local(t).is_cuda for t in tensors.values()))
        copies: dict[str, Tensor] = {}
        cuda = next((t.device for t in tensors.values() if local(t).is_cuda), None)
        with self._beside(cuda):
            for name, tensor in tensors.items():
                source = local(tensor.detach())
                target = self._room(places[name], source)
                target.copy_(source, non_blocking=True)
                if source.is_cuda:
                    source.record_stream(self._stream)
                copies[name] = _like(tensor, target)
        return copies, None if cuda is None else self._stream.record_event()

    def close(self) -> None:
        """Free the memory, once nothing refers to the copies any more."""
        if self.shared is not None:
            self._unpin()
            self.shared.close()
            self.shared = None

    def _make_room(self, size: int, cuda: bool) -> None:
        if self.shared is None or self.shared.size < size:
            self.close()
            self.shared = SharedArena(size)
            if cuda:
                self._pin()

    def _room(self, place: int, like: Tensor) -> Tensor:
        if like.numel() == 0:
            return torch.empty(like.shape, dtype=like.dtype)
        assert self.shared is not None
        found = torch.frombuffer(
            self.shared.view, dtype=torch.uint8, count=like.nbytes, offset=place
        )
        return found.view(like.dtype).view(like.shape)

    def _beside(self, device: torch.device | None) -> Any:
        """The stream for copies, behind all that was started before."""
        if device is None:
            return torch.no_grad()
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(self._stream)

    def _pin(self) -> None:
        """Page-lock the area; copies from the GPU are slower and synchronous where that fails."""
        assert self.shared is not None
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        result = runtime.cudaHostRegister(self.shared.address, self.shared.size, 0)
        self._pinned = int(result) == 0
        if not self._pinned:
            logger.warning(
                "%s bytes cannot be page-locked (%s); checkpoints copy from the GPU more slowly",
                f"{self.shared.size:,}",
                result,
            )

    def _unpin(self) -> None:
        if self._pinned and self.shared is not None:
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            runtime.cudaHostUnregister(self.shared.address)
            self._pinned = False


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that copies of some tensors take."""
    return _lay_out(tensors)[1]


def _lay_out(tensors: Mapping[str, Tensor]) -> tuple[dict[str, int], int]:
    places: dict[str, int] = {}
    position = 0
    for name, tensor in tensors.items():
        nbytes = local(tensor).nbytes
        alignment = PAGE if nbytes >= _LARGE else _SMALL_ALIGNMENT
        position = -(-position // alignment) * alignment
        places[name], position = position, position + nbytes
    return places, position


def _like(tensor: Tensor, part: Tensor) -> Tensor:
    """A copy of this rank's part as what the original is."""
    if not isinstance(tensor, DTensor):
        return part
    return DTensor.from_local(
        part,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
