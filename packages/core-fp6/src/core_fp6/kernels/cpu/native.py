"""Calls into a library of C kernels."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int32, c_int64, c_uint8, c_void_p

import torch
from torch import Tensor

from core.native import Variant
from core_fp6.kernels.cpu import eager
from core_fp6.layouts.execution import UPPER, planes_shape
from core_fp6.weights.numbers import Format
from core_fp6.weights.packed import Packed

_CHUNK = 2**20
"""Weights that are float32 at a time where another dtype is wanted."""


class _Codes(ctypes.Structure):
    """``struct codes`` of product.h."""

    _fields_ = (
        ("sign", c_int32 * 4),
        ("top", c_int32 * 4),
        ("mantissa", c_int32),
        ("bias", c_int32),
        ("halves", c_uint8 * 64 * 2),
    )


class _Product(ctypes.Structure):
    """``struct product`` of product.h."""

    _fields_ = (
        ("low", c_void_p),
        ("high", c_void_p),
        ("scale", c_void_p),
        ("x", c_void_p),
        ("bias", c_void_p),
        ("out", c_void_p),
        ("workspace", c_void_p),
        ("codes", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("tokens", c_int64),
        ("group_size", c_int32),
        ("single", c_int32),
    )


class Native:
    """The products of a library; threads are those of its own pool, as many as torch uses.

    Args:
        library: built from the sources beside this file.
        variant: which one it is, and why.
        bfloat16: whether it takes bfloat16 activations as they are.
    """

    def __init__(self, library: ctypes.CDLL, variant: Variant, *, bfloat16: bool) -> None:
        self.variant = variant
        self._dtypes = (torch.float32, *([torch.bfloat16] if bfloat16 else []))
        self._size = library.core_fp6_workspace
        self._size.argtypes, self._size.restype = [c_void_p], c_int64
        self._linear = library.core_fp6_linear
        self._dequantize = library.core_fp6_dequantize
        for function in (self._linear, self._dequantize):
            function.argtypes, function.restype = [c_void_p, c_int32], None

    def linear(self, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        """See :func:`core_fp6.kernels.cpu.linear`."""
        if x.dtype == torch.float64:
            return eager.linear(x, weight, bias)
        _require_sizes(weight)
        if x.shape[1:] != weight.shape[1:] or (bias is not None and len(bias) != weight.shape[0]):
            raise ValueError(f"no product of {list(x.shape)} and a weight {list(weight.shape)}")
        given = x.to(x.dtype if x.dtype in self._dtypes else torch.float32).contiguous()
        out = given.new_empty(x.shape[0], weight.shape[0])
        if not out.numel():
            return out.to(x.dtype)
        bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
        # These names keep what the library reads alive until it is done.
        weight = _contiguous(weight)
        product = _product(weight, out)
        product.x, product.tokens = given.data_ptr(), x.shape[0]
        product.bias = None if bias is None else bias.data_ptr()
        product.single = given.dtype == torch.float32
        where = ctypes.addressof(product)
        workspace = weight.low.new_empty(self._size(where))
        product.workspace = workspace.data_ptr()
        self._linear(where, torch.get_num_threads())
        return out.to(x.dtype)

    def dequantize(self, weight: Packed, dtype: torch.dtype) -> Tensor:
        """See :func:`core_fp6.kernels.cpu.dequantize`."""
        if dtype == torch.float64:
            return eager.dequantize(weight, dtype)
        _require_sizes(weight)
        out = weight.low.new_empty(weight.shape, dtype=dtype)
        rows = out.view(-1, weight.columns)
        step = len(rows) if dtype == torch.float32 else max(1, _CHUNK // weight.columns)
        flat = _contiguous(eager.flat(weight))
        for begin in range(0, len(rows), max(1, step)):
            part = eager.rows_of(flat, begin, begin + step)
            into = rows[begin : begin + step]
            exact = (
                into if dtype == torch.float32 else into.new_empty(into.shape, dtype=torch.float32)
            )
            product = _product(part, exact)
            self._dequantize(ctypes.addressof(product), torch.get_num_threads())
            if exact is not into:
                into.copy_(exact)
        return out


def _require_sizes(weight: Packed) -> None:
    """The library trusts its caller: what it would read must be there."""
    low, high = planes_shape(weight.columns)
    leading = weight.low.shape[:-1]
    if not (
        weight.layout == "execution"
        and weight.low.shape == (*leading, low)
        and weight.high.shape == (*leading, high)
        and weight.scale.shape == weight.scheme.scale_shape(weight.shape)
        and weight.low.dtype == weight.high.dtype == torch.uint8
        and weight.scale.dtype == weight.scheme.scale_dtype
    ):
        raise ValueError(f"these are not the planes of a {weight.scheme.name} weight for kernels")


def _contiguous(weight: Packed) -> Packed:
    if weight.low.is_contiguous() and weight.high.is_contiguous() and weight.scale.is_contiguous():
        return weight
    return Packed(
        weight.low.contiguous(),
        weight.high.contiguous(),
        weight.scale.contiguous(),
        weight.scheme,
        weight.columns,
        weight.layout,
    )


def _product(weight: Packed, out: Tensor) -> _Product:
    return _Product(
        low=weight.low.data_ptr(),
        high=weight.high.data_ptr(),
        scale=weight.scale.data_ptr(),
        out=out.data_ptr(),
        codes=ctypes.addressof(_codes(weight.scheme.format)),
        rows=weight.shape[0],
        columns=weight.columns,
        group_size=weight.scheme.group_size,
    )


@functools.cache
def _codes(fmt: Format) -> _Codes:
    sign, top = zip(*UPPER[fmt], strict=True)
    codes = _Codes(mantissa=fmt.mantissa, bias=fmt.bias)
    codes.sign[:], codes.top[:] = sign, top
    values = torch.tensor(fmt.values(), dtype=torch.bfloat16, device="cpu")
    for half, bytes_ in zip(codes.halves, values.view(torch.uint8).view(64, 2).T, strict=True):
        half[:] = bytes_.tolist()
    return codes
