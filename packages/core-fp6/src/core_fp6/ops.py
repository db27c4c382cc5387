"""Operators of torch for products with six-bit weights: for eager, compile, export and autograd.

They take planes in the layout of kernels. The weights are constants: gradients go to the input and
the bias, which is all that adapters need.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor

from core.errors import EngineError
from core_fp6.kernels import reference
from core_fp6.weights.numbers import parse
from core_fp6.weights.packed import Packed
from core_fp6.weights.scaling import Scheme


class Backend(Protocol):
    """The products on one kind of device, as :mod:`core_fp6.kernels.reference` documents them."""

    def linear(self, x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor: ...

    def grouped_linear(self, x: Tensor, weight: Packed, ends: Tensor) -> Tensor: ...

    def dequantize(self, weight: Packed, dtype: torch.dtype) -> Tensor: ...


def backend(device: torch.device) -> Backend:
    """What computes on a device.

    Raises:
        EngineError: for a CUDA device where Triton is not installed.
    """
    if device.type == "cuda":
        return _on_cuda()
    if device.type == "cpu":
        from core_fp6.kernels import cpu

        return cast(Backend, cpu)
    return cast(Backend, reference)


def _on_cuda() -> Backend:
    try:
        from core_fp6.kernels import gpu
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise EngineError(
            "six-bit weights cannot be used on this GPU",
            why="Triton, which compiles their kernels, is not installed",
            fix="pip install triton",
        ) from error
    return cast(Backend, gpu)


def linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` for a weight in the layout of kernels.

    Args:
        x: ``[..., columns]``, float16, bfloat16 or float32; any strides.
        weight: ``[rows, columns]``.
        bias: ``[rows]`` or None.

    Returns:
        ``[..., rows]`` in the dtype of ``x``: added up in float32, rounded once.
    """
    _require_execution(weight)
    return cast(Tensor, _linear(x, *_tensors(weight), bias, *_numbers(weight)))


def grouped_linear(x: Tensor, weight: Packed, ends: Tensor) -> Tensor:
    """``x[begin:end] @ weight[expert].T`` for every expert.

    Args:
        x: ``[tokens, columns]``, the tokens of an expert side by side, in the order of experts.
        weight: ``[experts, rows, columns]`` in the layout of kernels.
        ends: int32 ``[experts]``: where the tokens of each expert end; the last is ``tokens``.

    Returns:
        ``[tokens, rows]``.
    """
    _require_execution(weight)
    return cast(Tensor, _grouped_linear(x, *_tensors(weight), ends, *_numbers(weight)))


def _require_execution(weight: Packed) -> None:
    if weight.layout != "execution":
        raise ValueError('kernels take the layout "execution": call weight.to("execution") once')


def _tensors(weight: Packed) -> tuple[Tensor, Tensor, Tensor]:
    return weight.low, weight.high, weight.scale


def _numbers(weight: Packed) -> tuple[str, int, int]:
    return weight.scheme.format.name, weight.scheme.group_size, weight.columns


def _packed(
    low: Tensor, high: Tensor, scale: Tensor, fmt: str, group_size: int, columns: int
) -> Packed:
    return Packed(low, high, scale, Scheme(parse(fmt), group_size), columns, "execution")


def _require_columns(x: Tensor, columns: int) -> None:
    if x.shape[-1] != columns:
        raise ValueError(f"an input of shape {list(x.shape)} meets a weight of {columns} columns")


@torch.library.custom_op("core_fp6::linear", mutates_args=())
def _linear(
    x: Tensor,
    weight: Tensor,
    weight_hi: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    format: str,
    group_size: int,
    columns: int,
) -> Tensor:
    packed = _packed(weight, weight_hi, weight_scale, format, group_size, columns)
    _require_columns(x, columns)
    flat = x.reshape(-1, columns)
    if not flat.shape[0]:
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    out = backend(x.device).linear(flat, packed, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("core_fp6::grouped_linear", mutates_args=())
def _grouped_linear(
    x: Tensor,
    weight: Tensor,
    weight_hi: Tensor,
    weight_scale: Tensor,
    ends: Tensor,
    format: str,
    group_size: int,
    columns: int,
) -> Tensor:
    packed = _packed(weight, weight_hi, weight_scale, format, group_size, columns)
    _require_columns(x, columns)
    if not x.shape[0]:
        return x.new_empty(0, weight.shape[1])
    return backend(x.device).grouped_linear(x, packed, ends)


@torch.library.custom_op("core_fp6::dequantize", mutates_args=())
def _dequantize(
    weight: Tensor,
    weight_hi: Tensor,
    weight_scale: Tensor,
    format: str,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    packed = _packed(weight, weight_hi, weight_scale, format, group_size, columns)
    return backend(weight.device).dequantize(packed, dtype)


@_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    weight_hi: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    format: str,
    group_size: int,
    columns: int,
) -> Tensor:
    _require_columns(x, columns)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@_grouped_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    weight_hi: Tensor,
    weight_scale: Tensor,
    ends: Tensor,
    format: str,
    group_size: int,
    columns: int,
) -> Tensor:
    _require_columns(x, columns)
    return x.new_empty(x.shape[0], weight.shape[1])


@_dequantize.register_fake
def _(
    weight: Tensor,
    weight_hi: Tensor,
    weight_scale: Tensor,
    format: str,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    return weight.new_empty(*weight.shape[:-1], columns, dtype=dtype)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, high, scale, bias, *numbers = inputs
    ctx.save_for_backward(weight, high, scale)
    ctx.numbers = numbers
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ _dequantize(*ctx.saved_tensors, *ctx.numbers, grad.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None, None, None


def _save_grouped(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, high, scale, ends, *numbers = inputs
    ctx.save_for_backward(weight, high, scale, ends)
    ctx.numbers = numbers


@torch.library.custom_op("core_fp6::grouped_backward", mutates_args=())
def _grouped_backward(
    grad: Tensor,
    weight: Tensor,
    weight_hi: Tensor,
    weight_scale: Tensor,
    ends: Tensor,
    format: str,
    group_size: int,
    columns: int,
) -> Tensor:
    packed = _packed(weight, weight_hi, weight_scale, format, group_size, columns)
    out = grad.new_zeros(grad.shape[0], columns)
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            matrix = reference.expert_of(packed, expert).dequantize(grad.dtype)
            out[begin:end] = grad[begin:end] @ matrix
        begin = end
    return out


@_grouped_backward.register_fake
def _(
    grad: Tensor,
    weight: Tensor,
    weight_hi: Tensor,
    weight_scale: Tensor,
    ends: Tensor,
    format: str,
    group_size: int,
    columns: int,
) -> Tensor:
    return grad.new_empty(grad.shape[0], columns)


def _grouped_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = _grouped_backward(grad, *ctx.saved_tensors, *ctx.numbers)
    return grad_x, None, None, None, None, None, None, None


_linear.register_autograd(_linear_backward, setup_context=_save_linear)
_grouped_linear.register_autograd(_grouped_linear_backward, setup_context=_save_grouped)
