"""Which operations on logits can wait until the logits are needed, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from core_fpdt.loss.projection import Projection

_CASTS: Mapping[str, torch.dtype] = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}
_ARITHMETIC = frozenset(
    {"add", "sub", "subtract", "__rsub__", "mul", "multiply", "div", "divide", "true_divide"}
)
_ELEMENTWISE = _ARITHMETIC | {"neg", "negative", "tanh"}
_RESHAPES = frozenset({"view", "reshape", "flatten", "squeeze", "unsqueeze", "contiguous", "clone"})
_VIEWS = _RESHAPES - {"clone"} | {"detach"}
_TRANSPOSES = frozenset({"transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis"})


@dataclass(frozen=True, eq=False)
class Recipe:
    """Logits that have not been computed.

    Args:
        hidden: (..., H) hidden states, one for every row of logits.
        projection: from hidden states to logits.
        dtype: of the logits.
        swapped: the logits are (B, V, T), not (B, T, V).
    """

    hidden: Tensor
    projection: Projection
    dtype: torch.dtype
    swapped: bool = False

    @property
    def shape(self) -> torch.Size:
        """Of the logits."""
        shape = torch.Size((*self.hidden.shape[:-1], self.projection.vocabulary))
        return torch.Size((shape[0], shape[2], shape[1])) if self.swapped else shape

    def compute(self) -> Tensor:
        """Compute the logits, differentiably."""
        logits = self.projection.finish(self.projection.product(self.hidden))
        return logits.transpose(1, 2) if self.swapped else logits

    def reads(self) -> list[Tensor]:
        """All tensors that the logits depend on."""
        steps = self.projection.steps
        extra = [value for step in steps for value in step.args if isinstance(value, Tensor)]
        weights = self.projection.weight, self.projection.bias
        return [self.hidden, *(tensor for tensor in weights if tensor is not None), *extra]


def after(
    recipe: Recipe, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Recipe | None:
    """Say what a function makes of logits, without computing them.

    Args:
        recipe: of the logits, the function's first argument.
        function: of PyTorch.
        args: its other positional arguments.
        kwargs: its keyword arguments.

    Returns:
        The recipe of the result, ``recipe`` itself if that is the same tensor, or none where the
        function has to read logits.
    """
    name: str = getattr(function, "__name__", "")
    if name in _ELEMENTWISE:
        return _elementwise(recipe, function, args, kwargs)
    if name in _CASTS and not args and not kwargs:
        return _cast(recipe, _CASTS[name])
    if name in {"to", "type", "type_as"}:
        return _to(recipe, name, args, kwargs)
    if name == "detach":
        return _detach(recipe)
    if name == "__getitem__":
        return _index(recipe, args[0])
    if name in _RESHAPES or name in _TRANSPOSES:
        return _move(recipe, function, args, kwargs)
    return None


def shares(function: Callable[..., Any]) -> bool:
    """Tell whether the result of a recorded function is the memory of its argument."""
    name: str = function.__name__
    return name == "__getitem__" or name in _VIEWS or name in _TRANSPOSES


def _elementwise(
    recipe: Recipe, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Recipe | None:
    fitting = [_operand(recipe, value) for value in args]
    if any(value is None for value in fitting) or not all(map(_is_plain, kwargs.values())):
        return None
    meta = [value.to("meta") if isinstance(value, Tensor) else value for value in fitting]
    example = torch.empty(1, recipe.projection.vocabulary, dtype=recipe.dtype, device="meta")
    dtype = function(example, *meta, **kwargs).dtype
    projection = recipe.projection.then(function, tuple(fitting), kwargs)
    return replace(recipe, projection=projection, dtype=dtype) if dtype.is_floating_point else None


def _operand(recipe: Recipe, value: object) -> Any:
    """A number or constant tensor that is the same for all rows, else none."""
    if not isinstance(value, Tensor):
        return value if isinstance(value, int | float) else None
    if type(value) is not Tensor or value.requires_grad:
        return None
    if value.dim() == 0 or value.device == recipe.hidden.device:
        if value.dim() == 0 or value.shape == (1,):
            return value
        row = value.numel() == value.shape[-1] == recipe.projection.vocabulary
        if row and not recipe.swapped and value.dim() <= recipe.hidden.dim():
            return value.reshape(-1)
    return None


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, int | float | str)


def _cast(recipe: Recipe, dtype: torch.dtype) -> Recipe | None:
    if dtype == recipe.dtype:
        return recipe
    if not dtype.is_floating_point:
        return None
    projection = recipe.projection.then(Tensor.to, (dtype,), {})
    return replace(recipe, projection=projection, dtype=dtype)


def _to(recipe: Recipe, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recipe | None:
    if kwargs.get("copy") or kwargs.get("memory_format") or (name == "type" and not args):
        return None
    wanted = {key: value for key, value in kwargs.items() if key in {"device", "dtype"}}
    for value in args:
        if isinstance(value, Tensor):
            wanted |= {"device": value.device, "dtype": value.dtype}
        elif isinstance(value, torch.dtype):
            wanted["dtype"] = value
        elif isinstance(value, str | int | torch.device) and not isinstance(value, bool):
            wanted["device"] = value
    if "device" in wanted and not _is_here(recipe.hidden.device, wanted["device"]):
        return None
    return _cast(recipe, wanted.get("dtype") or recipe.dtype)


def _is_here(device: torch.device, wanted: Any) -> bool:
    return wanted is None or torch.empty(0, device=wanted).device == device


def _detach(recipe: Recipe) -> Recipe:
    projection = recipe.projection
    bias = None if projection.bias is None else projection.bias.detach()
    projection = projection.with_weights(projection.weight.detach(), bias)
    return replace(recipe, hidden=recipe.hidden.detach(), projection=projection)


def _index(recipe: Recipe, index: Any) -> Recipe | None:
    """Take rows: what is taken of the logits is computed from the same rows of hidden states."""
    items = index if isinstance(index, tuple) else (index,)
    used = 0
    for item in items:
        if isinstance(item, Tensor) and item.dtype in {torch.bool, torch.uint8}:
            used += item.dim()
        elif isinstance(item, int | slice | Tensor) and not isinstance(item, bool):
            used += 1
        elif item is not None and item is not Ellipsis:
            return None
    whole = items and isinstance(items[-1], slice) and items[-1] == slice(None)
    dots = any(item is Ellipsis for item in items)
    untouched = (
        whole or (items and items[-1] is Ellipsis) or (not dots and used < len(recipe.shape))
    )
    if recipe.swapped or not untouched:
        return None
    return replace(recipe, hidden=recipe.hidden[index])


def _move(
    recipe: Recipe, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Recipe | None:
    """Arrange rows otherwise, or let classes come before tokens."""
    before = torch.empty(recipe.shape, dtype=recipe.dtype, device="meta")
    moved = function(before, *args, **kwargs)
    if moved.dtype != recipe.dtype or recipe.swapped:
        return recipe if function.__name__ == "contiguous" else None
    if function.__name__ in _RESHAPES:
        if moved.dim() == 0 or moved.shape[-1] != recipe.projection.vocabulary:
            return None
        shape = *moved.shape[:-1], recipe.hidden.shape[-1]
        return replace(recipe, hidden=recipe.hidden.reshape(shape))
    swapped = before.transpose(1, 2) if before.dim() == 3 else before
    if moved.shape == swapped.shape and moved.stride() == swapped.stride():
        return replace(recipe, swapped=before.dim() == 3)
    return None
