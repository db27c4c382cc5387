"""Blocks by torch's flash attention for CPUs, whose operators give and take the log-sum-exp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from core.softmax import Partial
from core_fpdt.kernels.contract import Gradients, Scores
from core_fpdt.masks.tiles import Kind, Tile

DTYPES: Final = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class CPUFlash:
    """Never holds scores; any tile, grouped heads, values of another width than keys.

    Args:
        name: what ``fpdt.kernel`` calls it.
    """

    name: str = "cpu_flash"

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why it can compute nothing there, or an empty string."""
        if device.type != "cpu":
            return f"it runs on CPUs, not on {device.type}"
        return "" if dtype in DTYPES else f"it does not compute {dtype}"

    def works(self, query: Tensor, key: Tensor, value: Tensor, tile: Tile, scores: Scores) -> str:
        """See :meth:`core_fpdt.kernels.contract.Kernel.works`."""
        if scores.softcap is not None:
            return "it has no softcap"
        # The operator divides by the number of blocks, and so by zero.
        if not (query.numel() and key.numel() and value.numel()):
            return "there are no tokens"
        return self.unavailable(query.device, query.dtype)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, tile: Tile, scores: Scores
    ) -> Partial:
        """See :meth:`core_fpdt.kernels.contract.Kernel.forward`; the output has the query's dtype."""
        width = max(query.shape[3], value.shape[3])
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_widened(x, width) for x in (query, key, value)),
            0.0,
            tile.kind is Kind.CAUSAL,
            attn_mask=_bias(tile, query.dtype),
            scale=scores.scale,
        )
        if tile.kind is Kind.PARTIAL:
            # The operator gives 0 for a row without keys, which is that of one key with score 0.
            lse = lse.masked_fill(~tile.visible().any(-1), -torch.inf)
        return Partial(output[..., : value.shape[3]], lse)

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
        width = max(query.shape[3], value.shape[3])
        made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_widened(x, width) for x in (grad, query, key, value, output)),
            # exp(score - inf) is 0: a row without any key has no gradient.
            lse.masked_fill(lse == -torch.inf, torch.inf),
            0.0,
            tile.kind is Kind.CAUSAL,
            attn_mask=_bias(tile, query.dtype),
            scale=scores.scale,
        )
        pairs = zip(made, (query, key, value), strict=True)
        return Gradients(*(gradient[..., : x.shape[3]] for gradient, x in pairs))


def _widened(tensor: Tensor, width: int) -> Tensor:
    """Zeros behind the last dimension: all widths have to be one, and zeros change no product."""
    missing = width - tensor.shape[3]
    return pad(tensor, (0, missing)) if missing else tensor


def _bias(tile: Tile, dtype: torch.dtype) -> Tensor | None:
    if tile.kind is not Kind.PARTIAL:
        return None
    visible = tile.visible()
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)


CPU_FLASH: Final = CPUFlash()
