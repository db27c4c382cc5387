"""Attention sinks: one more logit of every head in the denominator of its softmax, with no value.

They join once, after the last block: attention over all keys and a sink is a merge of two parts, of
which one has output 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core.softmax import Partial
from core_fpdt.kernels.casting import accumulator


def apply_sinks(part: Partial, sinks: Tensor) -> Partial:
    """Let the sinks of heads take their share of attention over all keys.

    Args:
        part: attention of some queries over all of their keys.
        sinks: (H,) logits.

    Returns:
        Output and lse in float32 (float64 for float64 lse). What the backward pass of blocks gets.
    """
    sink = _by_row(sinks, part.lse)
    lse = torch.logaddexp(part.lse, sink)
    share = _share(part.lse, lse)
    # Kernels leave anything in rows that see no key, and 0 * NaN is NaN.
    output = part.output.to(lse.dtype).masked_fill(share.unsqueeze(-1) == 0, 0)
    return Partial(output * share.unsqueeze(-1), lse)


def sink_gradient(grad: Tensor, output: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Gradient of the sinks of heads: ``-sum(p_sink * (grad . output))`` over batch and queries.

    Args:
        grad: (B, H, Tq, Dv) gradient of the output.
        output: (B, H, Tq, Dv) as :func:`apply_sinks` returned it, in any dtype.
        lse: (B, H, Tq) as :func:`apply_sinks` returned it.
        sinks: (H,) logits.

    Returns:
        (H,) in float32 (float64 for float64 lse), to be added up over chunks.
    """
    wide = accumulator(lse.dtype)
    delta = (grad.to(wide) * output.to(wide)).sum(-1)
    share = _share(_by_row(sinks, lse), lse)
    return -(share * delta).sum(dim=(0, 2))


def _by_row(sinks: Tensor, lse: Tensor) -> Tensor:
    return sinks.to(lse.dtype)[None, :, None].expand_as(lse)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """``exp(part - whole)``, and 0 where both are minus infinity."""
    return (part - whole).masked_fill(part == -torch.inf, -torch.inf).exp()
