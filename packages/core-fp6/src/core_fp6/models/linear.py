"""A linear module with a six-bit weight."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from core_fp6 import ops
from core_fp6.models.sixbit import SixBit
from core_fp6.weights import packed
from core_fp6.weights.scaling import Scheme


class FP6Linear(SixBit, nn.Linear):
    """``x @ weight.T + bias`` with a weight of six-bit codes.

    It counts as a linear module, so that adapters and tensor parallelism treat it as one; its
    ``weight`` is the low plane of the codes.

    Args:
        in_features: columns of the weight.
        out_features: rows.
        scheme: format and group size.
        bias: whether there is one.
        device: of all parameters.
        dtype: of the bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super(nn.Linear, self).__init__()
        self.begin(scheme)
        self.in_features, self.out_features = in_features, out_features
        self.add("weight", torch.Size((out_features, in_features)), device)
        made = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if made is None else nn.Parameter(made))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        scheme: Scheme,
        scale: Tensor | None = None,
        name: str = "weight",
    ) -> FP6Linear:
        """Round the weight of a linear module; its bias is shared.

        Args:
            linear: the module; it stays as it is.
            scheme: format and group size.
            scale: scales to use, else those that fit the largest magnitudes.
            name: what errors call the weight.

        Raises:
            ModelError: when the weight has NaN or infinities.
        """
        weight = packed.quantize(
            linear.weight.detach(), scheme, scale=scale, layout="execution", name=name
        )
        return cls.from_packed(weight, linear.bias, linear.training)

    @classmethod
    def from_packed(
        cls, weight: packed.Packed, bias: nn.Parameter | None = None, training: bool = False
    ) -> FP6Linear:
        """A module of a weight ``[rows, columns]`` and a bias, which are kept, not copied."""
        rows, columns = weight.shape
        module = cls(columns, rows, weight.scheme, device="meta")
        module.hold("weight", weight)
        module.register_parameter("bias", bias)
        return module.train(training)

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """A plain linear module with the weights that the codes stand for."""
        weight = self.dequantized("weight", dtype)
        rows, columns = weight.shape
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        linear.weight = nn.Parameter(weight)
        bias = self._bias()
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().to(dtype), bias.requires_grad)
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, in the dtype of the input."""
        return ops.linear(self.led(input), self.packed(), self.bias)

    def reset_parameters(self) -> None:
        """Nothing: six-bit weights come from a trained weight or a file."""

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self._bias() is not None}, scheme={self.scheme.name}"

    def _bias(self) -> nn.Parameter | None:
        return cast("nn.Parameter | None", self.bias)
