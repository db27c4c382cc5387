"""The own kernels as one of those to choose from; Triton is loaded when it is first asked for."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final

import torch
from torch import Tensor

from core.softmax import Partial
from core_fpdt.kernels.contract import Gradients, Scores
from core_fpdt.kernels.cuda import capability
from core_fpdt.masks.tiles import Tile

DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
WIDTH: Final = 256
"""Largest head dimension."""


@dataclass(frozen=True)
class TritonKernel:
    """Any tile and softcap; merges blocks as it goes, and adds up in float32.

    Args:
        name: what ``fpdt.kernel`` calls it.
    """

    name: str = "triton"

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why it can compute nothing there, or an empty string."""
        if dtype not in DTYPES:
            return f"it does not compute {dtype}"
        if not _installed():
            return "Triton is not installed: python3 -m pip install triton"
        if _interpreted():
            return ""
        if device.type != "cuda":
            return f"it runs on CUDA devices, not on {device.type}"
        if capability(device) < (8, 0):
            return "it needs a device of compute capability 8.0 or later"
        return ""

    def works(self, query: Tensor, key: Tensor, value: Tensor, tile: Tile, scores: Scores) -> str:
        """See :meth:`core_fpdt.kernels.contract.Kernel.works`."""
        del tile, scores
        if max(query.shape[3], value.shape[3]) > WIDTH:
            return f"its heads are at most {WIDTH} wide"
        if not (query.numel() and key.numel() and value.numel()):
            return "there are no tokens"
        return self.unavailable(query.device, query.dtype)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, tile: Tile, scores: Scores
    ) -> Partial:
        """See :meth:`core_fpdt.kernels.contract.Kernel.forward`; in float32."""
        from core_fpdt.kernels.triton.launching import attend

        return attend(query, key, value, tile, scores)

    def merge_forward(
        self,
        running: Partial,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tile: Tile,
        scores: Scores,
    ) -> Partial:
        """See :meth:`core_fpdt.kernels.merging.Merging.merge_forward`."""
        from core_fpdt.kernels.triton.launching import attend

        return attend(query, key, value, tile, scores, running)

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        tile: Tile,
        scores: Scores,
    ) -> Gradients:
        """See :meth:`core_fpdt.kernels.contract.Kernel.backward`; in float32."""
        from core_fpdt.kernels.triton.launching import differentiate

        delta = (grad.float() * output.float()).sum(-1)
        return differentiate(grad, query, key, value, delta, lse, tile, scores)


@functools.cache
def _installed() -> bool:
    return find_spec("triton") is not None


@functools.cache
def _interpreted() -> bool:
    from core_fpdt.kernels.triton.launching import interpreted

    return interpreted()


TRITON: Final = TritonKernel()
