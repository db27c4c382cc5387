"""Triton, which has no types, for kernels of plugins whose code is checked.

Importing this needs Triton; a package without it is told by ``ImportError``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

triton: Any = import_module("triton")
tl: Any = import_module("triton.language")

if TYPE_CHECKING:
    tensor = Any
    constexpr = Any
else:
    # Triton looks at the annotations of kernels.
    tensor, constexpr = tl.tensor, tl.constexpr

OPTIONS = {"enable_fp_fusion": True}
"""Of all launches: a product and a sum are one instruction, whatever is the default of Triton."""

Function = Callable[..., Any]


def jit(function: Function) -> Any:
    """A part of kernels in the language of Triton."""
    return triton.jit(function)


def kernel(*varying: str) -> Callable[[Function], Any]:
    """A kernel.

    Args:
        varying: parameters that change from call to call, such as a number of tokens. It is not
            compiled anew for one and for multiples of 16 of them.
    """
    return lambda function: triton.jit(function, do_not_specialize=varying)


def at_compile_time(function: Function) -> Any:
    """A Python function of constants that kernels may call."""
    return triton.constexpr_function(function)


def made_current(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which may be another one than that of a tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
