"""One linear layer with a repacked weight.

PyTorch repacks the weight of a linear layer at every call, which takes longer than multiplying a few
rows with it. oneDNN can keep it in the form that it reads.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import EngineError

_ROWS = 128
"""Rows that the form of a packed weight is chosen for; fewer are fast with it, too."""


class PackedLinear:
    """Replaces the forward of a live layer, and frees the values of its weight.

    The weight stays the same parameter, with its shape and dtype. Meanwhile it reads as NaN and
    refuses to be written; ``state_dict`` tells the real values.

    Args:
        layer: on the CPU.

    Raises:
        EngineError: for a dtype that this processor cannot multiply.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.weight = layer.weight
        self._packed = _reordered(self.weight.data)
        # A weight that was made in inference mode keeps to values that were, too.
        self._inference = self.weight.is_inference()
        with torch.inference_mode(self._inference):
            nothing = torch.full((), torch.nan, dtype=self.weight.dtype)
            self.weight.data = nothing.expand(self.weight.shape)
        layer.__dict__["forward"] = self.forward
        hooks: Any = layer
        self._hook = hooks.register_state_dict_post_hook(partial(self._tell))

    @property
    def untouched(self) -> bool:
        """Whether nobody has given the layer other values since it was packed."""
        now = self.layer.weight
        return now is self.weight and bool(now[0, 0].isnan())

    def forward(self, rows: Tensor) -> Tensor:
        """From (..., in) to (..., out), as ``nn.Linear``.

        Raises:
            EngineError: where gradients are wanted.
        """
        if torch.is_grad_enabled() and (rows.requires_grad or self.weight.requires_grad):
            raise EngineError(
                "a model with packed linear layers gives no gradients",
                fix="close the engine before training, or run the model under torch.no_grad()",
            )
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self._packed, self.layer.bias, "none", [], ""
        )
        return out

    def restore(self) -> None:
        """Put the weight and the forward back; values that were given meanwhile stay."""
        if self.untouched:
            # The model may have been moved or cast meanwhile.
            with torch.inference_mode(self._inference):
                self.weight.data = self._packed.to_dense().to(self.weight)
        del self.layer.__dict__["forward"]
        self._hook.remove()

    def _tell(self, _: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        if self.untouched:
            state[f"{prefix}weight"] = self._packed.to_dense()


def can_be_packed(layer: nn.Module) -> bool:
    """Whether a layer is a plain linear one, and nothing else holds the memory of its weight.

    Subclasses compute something of their own, and so may a layer whose forward is replaced already.
    """
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return False
    weight = layer.weight
    # Sharded weights are parameters of another type.
    return type(weight) is nn.Parameter and weight.numel() > 0 and not _shared(weight)


def _shared(weight: nn.Parameter) -> bool:
    """Whether the memory of a weight is held by others, such as a flat buffer or a process.

    Packing it would free nothing, and the others would not be the same memory afterwards.
    """
    storage: Any = weight.untyped_storage()
    count: Any = torch._C._storage_Use_Count  # pyright: ignore[reportPrivateUsage]
    # Two hold it here: the weight, and the storage that was just asked for.
    return bool(storage.is_shared() or count(storage._cdata) > 2)


def _reordered(weight: Tensor) -> Tensor:
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    except RuntimeError as error:
        raise EngineError(
            f"linear layers of {weight.dtype} cannot be packed on this processor",
            why=str(error).splitlines()[0],
            fix="turn splitfuse.pack_linears off, or use another dtype",
        ) from error
    return packed
