"""Which kernel computes a block: the first of a table that can, or the one that was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from core.errors import ModelError, SettingsError
from core_fpdt.kernels.contract import Kernel, Scores
from core_fpdt.kernels.cpu_flash import CPU_FLASH
from core_fpdt.kernels.cuda import ATEN_FLASH, CUDNN, capability
from core_fpdt.kernels.reference import REFERENCE
from core_fpdt.kernels.triton.kernel import TRITON
from core_fpdt.masks.tiles import Tile


class Candidate(Kernel, Protocol):
    """A kernel that can tell beforehand where it never works."""

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why it can compute nothing there, or an empty string."""
        ...


KERNELS: Final[dict[str, Candidate]] = {
    kernel.name: kernel for kernel in (REFERENCE, CPU_FLASH, ATEN_FLASH, CUDNN, TRITON)
}
"""All kernels by what ``fpdt.kernel`` calls them."""

_FIX: Final = 'use kernel = "auto"'


@dataclass(frozen=True)
class Chooser:
    """Chooses a kernel for every block.

    Args:
        kernels: in order of preference; where none was asked for, the last one computes everything.
    """

    kernels: tuple[Kernel, ...]

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, tile: Tile, scores: Scores
    ) -> Kernel:
        """The first kernel that computes a block.

        Args:
            query: (B, H, Tq, D).
            key: (B, Hkv, Tk, D).
            value: (B, Hkv, Tk, Dv).
            tile: who sees whom.
            scores: how scores are made.

        Raises:
            ModelError: when the kernel that was asked for does not.
        """
        why = ""
        for kernel in self.kernels:
            why = kernel.works(query, key, value, tile, scores)
            if not why:
                return kernel
        name = self.kernels[-1].name
        raise ModelError(f"{name} does not compute a {tile.kind.value} block", why=why, fix=_FIX)


def choose(name: str, device: torch.device, dtype: torch.dtype) -> Chooser:
    """Choose the kernels of a run.

    Args:
        name: what ``fpdt.kernel`` says; ``"auto"`` takes the fastest one for every block.
        device: where the model is.
        dtype: of the weights; those of float32 models may be cast by autocast.

    Raises:
        SettingsError: for a name that no kernel has.
        ModelError: for a kernel that can compute nothing there.

    Example:
        >>> [k.name for k in choose("auto", torch.device("cpu"), torch.float32).kernels]
        ['cpu_flash', 'reference']
    """
    if name == "auto":
        kernels = table(device.type, capability(device))
        return Chooser(tuple(k for k in kernels if not _unavailable(k, device, dtype)))
    if name not in KERNELS:
        known = ", ".join(KERNELS)
        raise SettingsError(f"no kernel is called {name!r}", fix=f"use auto or one of {known}")
    kernel = KERNELS[name]
    if why := _unavailable(kernel, device, dtype):
        raise ModelError(f"fpdt.kernel is {name!r}, which cannot run here", why=why, fix=_FIX)
    return Chooser((kernel,))


def table(kind: str, found: tuple[int, int]) -> tuple[Candidate, ...]:
    """Kernels by preference.

    Args:
        kind: of the device, such as ``"cuda"``.
        found: its compute capability.
    """
    if kind == "cpu":
        return CPU_FLASH, REFERENCE
    if found >= (9, 0):
        return CUDNN, ATEN_FLASH, TRITON, REFERENCE
    if found >= (8, 0):
        return ATEN_FLASH, TRITON, REFERENCE
    return (REFERENCE,)


def _unavailable(kernel: Candidate, device: torch.device, dtype: torch.dtype) -> str:
    """Why a kernel computes no block of a model, in whatever dtype blocks come."""
    cast = (torch.bfloat16, torch.float16) if dtype is torch.float32 else ()
    reasons = [kernel.unavailable(device, each) for each in (dtype, *cast)]
    return reasons[0] if all(reasons) else ""
