"""What ``torch.compile`` is kept out of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def untraced(function: Function) -> Function:
    """Run a function as it is when its caller is compiled: traced chunks would be unrolled."""
    return cast(Function, torch.compiler.disable(function))  # type: ignore[no-untyped-call]
