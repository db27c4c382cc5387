"""The staging area: one aligned arena that copies of tensors go into, kept between checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from core_fastpersist.dcp.audit import local
from core_fastpersist.dcp.image import Image
from core_fastpersist.direct.digests import Digests
from core_fastpersist.direct.memory import PAGE
from core_fastpersist.direct.remote import SharedArena

logger = logging.getLogger("core_fastpersist")
_LARGE = 32 * 2**10
_SMALL_ALIGNMENT = 64


class StagingArea:
    """Copies of tensors in memory that a writer process can map, page by page.

    Large copies begin at a page, so that direct I/O takes them from here. With CUDA the memory is
    page-locked, and copies run on a stream of their own.

    Attributes:
        image: the file that was last laid out over these copies, as long as they keep their places.
        described: what the last metadata were made of, their bytes, and the digests of these.
    """

    def __init__(self) -> None:
        self.shared: SharedArena | None = None
        self._pinned = False
        self._stream: Any = None
        self._layouts: dict[str, Any] = {}
        self._targets: list[Tensor] = []
        self._copies: dict[str, Tensor] = {}
        self.image: Image | None = None
        self.described: tuple[tuple[Any, ...], bytes, Digests] | None = None

    def copy(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        """Copy tensors into the area, over what was there before.

        Returns:
            the copies by name, on the CPU, sharded as the originals; and a CUDA event after which
            they are complete, or ``None`` when they are.
        """
        sources = [local(tensor.detach()) for tensor in tensors.values()]
        cuda = next((source.device for source in sources if source.is_cuda), None)
        layouts = {name: _layout(tensor) for name, tensor in tensors.items()}
        if layouts != self._layouts:
            self._lay_out(tensors, sources, pin=cuda is not None)
            self._layouts = layouts
        with self._beside(cuda), torch.no_grad():
            if sources:
                # One call for all, because a call for each takes longer than small tensors do.
                copy_all: Any = vars(torch)["_foreach_copy_"]
                copy_all(self._targets, sources, non_blocking=True)
            for source in sources if cuda else ():
                source.record_stream(self._stream)
        return dict(self._copies), None if cuda is None else self._stream.record_event()

    def close(self) -> None:
        """Free the memory, once nothing refers to the copies any more."""
        self._layouts, self._targets, self._copies, self.image = {}, [], {}, None
        if self.shared is not None:
            self._unpin()
            self.shared.close()
            self.shared = None

    def _lay_out(self, tensors: Mapping[str, Tensor], sources: Sequence[Tensor], pin: bool) -> None:
        self.image = None
        places, size = _places(tensors)
        if self.shared is None or self.shared.size < size:
            self.close()
            self.shared = SharedArena(size)
            if pin:
                self._pin()
        self._targets = [
            self._room(place, source)
            for place, source in zip(places.values(), sources, strict=True)
        ]
        named = zip(tensors.items(), self._targets, strict=True)
        self._copies = {name: _like(tensor, target) for (name, tensor), target in named}

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
            return nullcontext()
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
    return _places(tensors)[1]


def _places(tensors: Mapping[str, Tensor]) -> tuple[dict[str, int], int]:
    places: dict[str, int] = {}
    position = 0
    for name, tensor in tensors.items():
        nbytes = local(tensor).nbytes
        alignment = PAGE if nbytes >= _LARGE else _SMALL_ALIGNMENT
        position = -(-position // alignment) * alignment
        places[name], position = position, position + nbytes
    return places, position


def _layout(tensor: Tensor) -> Any:
    """What a copy's place and shape depend on."""
    sharding: Any = None
    if isinstance(tensor, DTensor):
        sharding = tensor.device_mesh, tensor.placements, local(tensor).shape, tensor.stride()
    return tensor.dtype, tensor.shape, tensor.device, sharding


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
