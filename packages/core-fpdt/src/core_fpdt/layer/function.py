"""A layer as one step of autograd, whatever it does inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core.errors import ModelError
from core_fpdt.layer.call import LayerCall
from core_fpdt.layer.collecting import Collected
from core_fpdt.layer.graphs import refuse_graph
from core_fpdt.layer.orders import KeyOrder, QueryOrder


def run_in_chunks(call: LayerCall, hidden: Tensor) -> Any:
    """Run a layer chunk by chunk, so that it can be gone backwards once.

    Parameters are inputs of one autograd function, and each gets its gradient once: hooks on them
    fire once, and DDP and FSDP reduce once.

    Args:
        call: the call.
        hidden: (B, s, H).

    Returns:
        What the layer returns.
    """
    parameters = [p for p in call.layer.parameters() if p.requires_grad]
    inputs = [*call.arguments.differentiable, *parameters]
    if call.keeping is None:
        return call.shaped(call.forward(hidden))
    output: Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]
        call, parameters, hidden, *inputs
    )
    return call.shaped(output)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: LayerCall,
        parameters: list[Tensor],
        hidden: Tensor,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.call, ctx.parameters = call, parameters
        try:
            output: Tensor = call.forward(hidden)
        except BaseException:
            call.close()
            raise
        # Where chunks of it are stored, the hidden states themselves need not live on.
        ctx.save_for_backward(*([] if call.offloads else [hidden]))
        ctx.template = hidden.new_empty(0), hidden.shape
        ctx.versions = _versions(call.layer)
        return output

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Any, ...]:
        refuse_graph("a layer in chunks")
        call: LayerCall | None = ctx.call
        if call is None:
            why = "what it kept was given back in the first one"
            fix = "call backward once, without retain_graph"
            raise ModelError("a second backward pass through a chunked layer", why=why, fix=fix)
        ctx.call = None
        try:
            if ctx.versions != _versions(call.layer):
                why = "its weights were changed after the forward pass, which is run again here"
                fix = "step the optimizer when all backward passes are done"
                raise ModelError(f"no gradient of {call.name}", why=why, fix=fix)
            if not call.offloads:
                call.hold(*ctx.saved_tensors)
            empty, shape = ctx.template
            collected = Collected(
                call, empty, shape if ctx.needs_input_grad[2] else None, ctx.parameters
            )
            order = (KeyOrder if call.chosen_order == "key" else QueryOrder)(call)
            with torch.autocast(grad.device.type, enabled=False):
                order.run(grad, collected)
            return (None, None, *collected.take())
        finally:
            call.close()


def _versions(layer: nn.Module) -> list[int]:
    """How often each parameter was written to: what autograd checks of tensors that it saved."""
    return [0 if p.is_inference() else p._version for p in layer.parameters()]
