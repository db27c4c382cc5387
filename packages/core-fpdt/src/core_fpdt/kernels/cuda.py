"""Blocks by the fused attention of torch on NVIDIA devices: flash attention, and that of cuDNN.

Both get only blocks without holes. What is cut and padded around the operators is in functions that
need no device, and the operators' own shapes are checked by their meta implementations.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from core.softmax import Partial
from core_fpdt.kernels.contract import Gradients, Scores
from core_fpdt.masks.tiles import Kind, Tile

DTYPES: Final = (torch.bfloat16, torch.float16)
FLASH_WIDTH: Final = 256
CUDNN_WIDTH: Final = 128
CUDNN_WIDTH_ON_HOPPER: Final = 256
"""Largest head dimensions."""


@dataclass(frozen=True)
class AtenFlash:
    """Flash attention as torch ships it, or FlashAttention 3 or 4 where it was activated.

    Args:
        name: what ``fpdt.kernel`` calls it.
    """

    name: str = "aten_flash"

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why it can compute nothing there, or an empty string."""
        return unavailable(device, dtype)

    def works(self, query: Tensor, key: Tensor, value: Tensor, tile: Tile, scores: Scores) -> str:
        """See :meth:`core_fpdt.kernels.contract.Kernel.works`."""
        if flash_width(query, value) > FLASH_WIDTH:
            return f"its heads are at most {FLASH_WIDTH} wide"
        return self.unavailable(query.device, query.dtype) or holes(query, key, tile, scores)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, tile: Tile, scores: Scores
    ) -> Partial:
        """See :meth:`core_fpdt.kernels.contract.Kernel.forward`; the output has the query's dtype."""
        width = flash_width(query, value)
        output, lse, *_ = torch.ops.aten._flash_attention_forward(
            *(to_flash(x, width) for x in (query, key, value)),
            None,
            None,
            query.shape[2],
            key.shape[2],
            0.0,
            tile.kind is Kind.CAUSAL,
            False,
            scale=scores.scale,
        )
        return Partial(from_flash(output, value.shape[3]), lse)

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
        """See :meth:`core_fpdt.kernels.contract.Kernel.backward`; in the query's dtype."""
        width = flash_width(query, value)
        made = torch.ops.aten._flash_attention_backward(
            *(to_flash(x, width) for x in (grad, query, key, value, output)),
            lse.contiguous(),
            None,
            None,
            query.shape[2],
            key.shape[2],
            0.0,
            tile.kind is Kind.CAUSAL,
            # State of dropout, of which there is none.
            torch.empty(2, dtype=torch.uint64, device=query.device),
            torch.empty((), dtype=torch.uint64, device=query.device),
            scale=scores.scale,
        )
        pairs = zip(made, (query, key, value), strict=True)
        return Gradients(*(from_flash(gradient, x.shape[3]) for gradient, x in pairs))


@dataclass(frozen=True)
class CuDNN:
    """The attention of cuDNN, the fastest of torch's on Hopper.

    Args:
        name: what ``fpdt.kernel`` calls it.
    """

    name: str = "cudnn"

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why it can compute nothing there, or an empty string."""
        backend: Any = torch.backends.cudnn
        if device.type == "cuda" and not backend.is_available():
            return "this torch comes without cuDNN"
        return unavailable(device, dtype)

    def works(self, query: Tensor, key: Tensor, value: Tensor, tile: Tile, scores: Scores) -> str:
        """See :meth:`core_fpdt.kernels.contract.Kernel.works`."""
        if torch.are_deterministic_algorithms_enabled():
            return "it is not deterministic, which torch.use_deterministic_algorithms asks for"
        return (
            self.unavailable(query.device, query.dtype)
            or misfit(query, value, hopper=capability(query.device) == (9, 0))
            or ("it does not take a single key" if key.shape[2] == 1 else "")
            or holes(query, key, tile, scores)
        )

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, tile: Tile, scores: Scores
    ) -> Partial:
        """See :meth:`core_fpdt.kernels.contract.Kernel.forward`; the output has the query's dtype."""
        output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *(dense(x) for x in (query, key, value)),
            None,
            True,
            0.0,
            tile.kind is Kind.CAUSAL,
            False,
            scale=scores.scale,
        )
        return Partial(output, lse.view(query.shape[:3]))

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
        """See :meth:`core_fpdt.kernels.contract.Kernel.backward`; in the query's dtype."""
        seed = torch.empty((), dtype=torch.long, device=query.device)
        made = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            # The gradient must lie in memory as the output does, or torch copies it with a warning.
            grad.contiguous(),
            *(dense(x) for x in (query, key, value)),
            output.contiguous(),
            lse.contiguous().unsqueeze(-1),
            seed,
            seed,
            None,
            None,
            None,
            query.shape[2],
            key.shape[2],
            0.0,
            tile.kind is Kind.CAUSAL,
            scale=scores.scale,
        )
        return Gradients(*made)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device; (0, 0) where there is none."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


def unavailable(device: torch.device, dtype: torch.dtype) -> str:
    """Why fused attention can compute nothing on a device, or an empty string."""
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type}"
    if dtype not in DTYPES:
        return f"it computes bfloat16 and float16, not {dtype}"
    if capability(device) < (8, 0):
        return "it needs a device of compute capability 8.0 or later"
    return ""


def holes(query: Tensor, key: Tensor, tile: Tile, scores: Scores) -> str:
    """Why a block is more than fused attention takes, or an empty string."""
    if scores.softcap is not None:
        return "it has no softcap"
    if tile.kind is Kind.PARTIAL:
        return "it takes no mask"
    if not query.shape[2] or not key.shape[2]:
        return "there are no tokens"
    if tile.kind is Kind.CAUSAL and query.shape[2] != key.shape[2]:
        # Where the diagonal ends depends on the operator and its version.
        return "its causal blocks are square"
    return ""


def misfit(query: Tensor, value: Tensor, *, hopper: bool) -> str:
    """Why cuDNN does not take head dimensions, or an empty string."""
    limit = CUDNN_WIDTH_ON_HOPPER if hopper else CUDNN_WIDTH
    widths = query.shape[3], value.shape[3]
    if max(widths) > limit:
        return f"its heads are at most {limit} wide on this device"
    if any(width % 8 for width in widths):
        return "its heads are multiples of 8 wide"
    return ""


def flash_width(query: Tensor, value: Tensor) -> int:
    """The width that flash attention needs all heads to have."""
    return -(-max(query.shape[3], value.shape[3]) // 8) * 8


def to_flash(tensor: Tensor, width: int) -> Tensor:
    """(B, H, T, N) as (B, T, H, width): zeros behind change no product."""
    missing = width - tensor.shape[3]
    tensor = tensor.transpose(1, 2)
    return pad(tensor, (0, missing)) if missing else dense(tensor)


def from_flash(tensor: Tensor, width: int) -> Tensor:
    """(B, T, H, N) as (B, H, T, width)."""
    return tensor[..., :width].transpose(1, 2)


def dense(tensor: Tensor) -> Tensor:
    """The tensor with numbers of a head side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


ATEN_FLASH: Final = AtenFlash()
CUDNN: Final = CuDNN()
