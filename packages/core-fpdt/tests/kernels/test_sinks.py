"""Sinks are one more key without a value, and so are their gradients."""

from __future__ import annotations

import pytest
import torch

from core.softmax import Partial
from core_fpdt.kernels.cpu_flash import CPU_FLASH
from core_fpdt.kernels.reference import REFERENCE
from core_fpdt.kernels.sinks import apply_sinks, sink_gradient


def with_sinks(case, sinks):
    """Output and gradients of inputs and sinks by autograd in float64."""
    inputs = [x.detach().double().requires_grad_() for x in (*case.inputs, sinks)]
    query, key, value, sink = inputs
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    logits = (query @ key.mT * case.scores.scale).masked_fill(~case.visible, -torch.inf)
    column = sink[None, :, None, None].expand(*logits.shape[:3], 1)
    output = torch.cat([logits, column], -1).softmax(-1)[..., :-1] @ value
    return output.detach(), torch.autograd.grad(output, inputs, case.grad.double())


@pytest.mark.parametrize("kernel", [REFERENCE, CPU_FLASH], ids=["reference", "cpu_flash"])
@pytest.mark.parametrize("kind", ["causal", "holes"])
@pytest.mark.parametrize("size", [0.0, 3.0, 300.0, -300.0])
def test_sinks_equal_autograd(kernel, kind, size, attention, error) -> None:
    case = attention(kind)
    sinks = torch.randn(4, dtype=torch.float64) + size
    truth, gradients = with_sinks(case, sinks)
    part = apply_sinks(case.run(kernel, [0, 5, 19])[0], sinks)
    assert error((part.output,), (truth,)) < 1e-12
    found = case.back(kernel, [0, 5, 19], part)
    sink = sink_gradient(case.grad, part.output, part.lse, sinks)
    assert error((*found, sink), gradients) < 1e-12


def test_rows_without_keys_give_everything_to_the_sink() -> None:
    part = Partial(torch.full((1, 2, 3, 4), torch.nan), torch.full((1, 2, 3), -torch.inf))
    sinks = torch.tensor([2.0, -torch.inf])
    output, lse = apply_sinks(part, sinks)
    assert (output == 0).all()
    assert (lse[:, 0] == 2).all()
    assert (lse[:, 1] == -torch.inf).all()
    gradient = sink_gradient(torch.ones(1, 2, 3, 4), output, lse, sinks)
    assert torch.equal(gradient, torch.zeros(2))


def test_sums_are_not_made_in_bfloat16(attention) -> None:
    case = attention("causal", batch=1, tokens=(600, 600))
    sinks = torch.randn(4, dtype=torch.float64)
    truth, gradients = with_sinks(case.to(torch.bfloat16), sinks.bfloat16())
    _, lse = apply_sinks(case.to(torch.bfloat16).run(CPU_FLASH, [0, 600])[0], sinks.bfloat16())
    assert lse.dtype == torch.float32
    found = sink_gradient(case.grad.bfloat16(), truth.bfloat16(), lse, sinks.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), gradients[3], rtol=2e-2, atol=2e-2)
