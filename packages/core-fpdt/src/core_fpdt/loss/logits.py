"""Logits that are computed when somebody reads them, and never as a whole for a loss.

To everybody else they are a tensor: with a shape, a dtype and a place in the graph. What is done to
them row by row is recorded, the cross entropy of them is computed chunk by chunk, and whatever else
is done computes them first. So no model and no loss has to be changed for long sequences.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from core.errors import ModelError
from core_fpdt.layer.graphs import refuse_graph
from core_fpdt.loss.cross_entropy import Rules, chunked_cross_entropy
from core_fpdt.loss.recording import Recipe, after, shares

_PROPERTIES = frozenset(
    {"shape", "dtype", "device", "ndim", "layout", "itemsize", "nbytes", "is_leaf", "requires_grad"}
    | {"grad_fn", "output_nr", "_base", "name", "names", "is_cpu", "is_cuda", "is_meta", "is_mps"}
    | {"is_mtia", "is_xpu", "is_sparse", "is_quantized", "is_nested", "is_mkldnn"}
)
_QUESTIONS = frozenset(
    {"size", "dim", "ndimension", "numel", "nelement", "__len__", "stride", "storage_offset"}
    | {"get_device", "element_size", "is_floating_point", "is_complex", "is_signed", "is_conj"}
    | {"is_contiguous", "is_inference", "_is_view"}
)
_as_plain_tensors = torch._C.DisableTorchFunctionSubclass  # pyright: ignore[reportPrivateUsage]
_CROSS_ENTROPY = inspect.signature(nn.functional.cross_entropy)


class _Source(NamedTuple):
    parent: LazyLogits
    function: Callable[[Tensor], Tensor]
    shares: bool


class LazyLogits(Tensor):
    """(..., V) logits that have not been computed; made by :meth:`of` only.

    Reading them computes and keeps them, and from then on they behave like the tensor they stand
    for, gradients and in-place changes included.

    Example::

        logits = model(ids).logits                   # nothing was computed
        loss = F.cross_entropy(logits.view(-1, V), labels.view(-1))   # chunk by chunk
        logits[:, -1].argmax(-1)                     # computes the last rows
        logits.argmax(-1)                            # computes all
    """

    recipe: Recipe
    computed: Tensor | None
    _source: _Source | None
    _family: list[weakref.ref[LazyLogits]]
    gates: list[Callable[[Tensor], Any]]
    _versions: list[int]
    in_graph: bool
    _alone: bool

    @classmethod
    def of(cls, recipe: Recipe) -> LazyLogits:
        """Make logits of a recipe, in the graph if gradients are enabled."""
        projection = recipe.projection
        lazy: LazyLogits = _Deferred.apply(  # type: ignore[no-untyped-call]
            recipe, recipe.hidden, projection.weight, projection.bias
        )
        lazy.recipe, lazy.computed, lazy._source = recipe, None, None
        lazy._family, lazy.gates = [weakref.ref(lazy)], []
        lazy._versions = [_version(tensor) for tensor in recipe.reads()]
        lazy.in_graph, lazy._alone = torch.is_grad_enabled(), False
        return lazy

    def materialize(self) -> Tensor:
        """Compute the logits, once, as the model would have.

        Raises:
            ModelError: when that is no longer possible, because weights were changed or freed.
        """
        if self.computed is None:
            self.require_inputs()
            with torch.set_grad_enabled(self.in_graph):
                if self._source is not None and self._source.parent.computed is not None:
                    self.computed = self._source.function(self._source.parent.computed)
                else:
                    # Not through the parent: of a few rows, only those are computed.
                    self.computed = self.recipe.compute()
                    self._alone = self._source is not None and self._source.shares
            for gate in self.gates if self.computed.requires_grad else ():
                self.computed.register_hook(gate)  # type: ignore[no-untyped-call]
        return self.computed

    def register_hook(self, hook: Callable[[Tensor], Any]) -> Any:
        """As of any tensor. FSDP's hooks only want to know when the backward pass begins."""
        module: str = getattr(hook, "__module__", None) or ""
        if not module.startswith("torch.distributed.fsdp"):
            return self.materialize().register_hook(hook)  # type: ignore[no-untyped-call]
        self.gates.append(hook)
        with _as_plain_tensors():
            return super().register_hook(hook)  # type: ignore[no-untyped-call]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        state = "not computed" if self.computed is None else "computed"
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, {state})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _is_question(func):
            with _as_plain_tensors():
                return func(*args, **kwargs)
        if func is nn.functional.cross_entropy:
            loss = _cross_entropy(args, kwargs)
            if loss is not None:
                return loss
        elif args and isinstance(args[0], cls) and args[0].computed is None:
            derived = args[0]._derive(func, args[1:], kwargs)
            if derived is not None:
                return derived
        if _writes(func, kwargs):
            for lazy in tree_leaves((args, kwargs)):
                if isinstance(lazy, cls):
                    lazy._before_write()
        positional, named = tree_map(_computed, (args, kwargs))
        return func(*positional, **named)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # What calls PyTorch from C++, such as an autograd Function, does not come by above.
        if func._schema.is_mutable:
            raise ModelError(f"logits that were not computed cannot be changed by {func}")
        positional, named = tree_map(_values, (args, kwargs or {}))
        return func(*positional, **named)

    def _derive(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> LazyLogits | None:
        if any(isinstance(value, LazyLogits) for value in tree_leaves((args, kwargs))):
            return None
        with torch.set_grad_enabled(self.in_graph and torch.is_grad_enabled()):
            recipe = after(self.recipe, func, args, kwargs)
            if recipe is None or recipe is self.recipe:
                return None if recipe is None else self
            self.require_inputs()
            lazy = LazyLogits.of(recipe)
        lazy._source = _Source(self, lambda it: func(it, *args, **kwargs), shares(func))
        lazy.gates, lazy._family = self.gates, self._family
        self._family.append(weakref.ref(lazy))
        return lazy

    def _before_write(self) -> None:
        """Make the tensors that share memory in the graph of views share it in fact."""
        family = [lazy for lazy in (ref() for ref in self._family) if lazy is not None]
        if any(lazy._alone for lazy in family):
            raise ModelError(
                "logits are changed in place, after some rows of them were read alone",
                fix="write logits = logits * factor instead of logits *= factor",
            )
        for lazy in family:
            lazy.materialize()

    def require_inputs(self) -> None:
        tensors = self.recipe.reads()
        if [_version(tensor) for tensor in tensors] != self._versions:
            why = "what they are computed from has changed since, for example by optimizer.step()"
        elif any(t.numel() and not t.untyped_storage().size() for t in tensors):
            why = "the weights of the output head were freed, as FSDP does after the forward pass"
        else:
            return
        raise ModelError(
            "logits of a long sequence cannot be computed any more",
            why=why,
            fix="read logits right after the model was called, or give the model labels",
        )


class _Deferred(torch.autograd.Function):
    """The place of lazy logits in the graph, for what reads them behind Python's back."""

    @staticmethod
    def forward(
        ctx: Any, recipe: Recipe, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.recipe = recipe
        ctx.save_for_backward(hidden, weight, bias)
        lazy: Tensor = Tensor._make_wrapper_subclass(
            LazyLogits, recipe.shape, dtype=recipe.dtype, device=hidden.device
        )
        return lazy

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        refuse_graph("logits that were not computed by PyTorch")
        needed = ctx.needs_input_grad[1:4]
        hidden, weight, bias = (
            None if tensor is None else tensor.detach().requires_grad_(need)
            for tensor, need in zip(ctx.saved_tensors, needed, strict=True)
        )
        projection = ctx.recipe.projection.with_weights(weight, bias)
        with torch.enable_grad():
            logits = replace(ctx.recipe, hidden=hidden, projection=projection).compute()
        wanted = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
        wanted = [tensor for tensor in wanted if tensor.requires_grad]
        found = iter(torch.autograd.grad(logits, wanted, grad))
        return None, *(next(found) if need else None for need in needed)


def _cross_entropy(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The loss, or none where it is not of lazy logits and classes."""
    call = _CROSS_ENTROPY.bind(*args, **kwargs)
    call.apply_defaults()
    lazy, target = call.arguments["input"], call.arguments["target"]
    weight, reduction = call.arguments["weight"], call.arguments["reduction"]
    if (
        not isinstance(lazy, LazyLogits)
        or lazy.computed is not None
        or isinstance(target, LazyLogits)
    ):
        return None
    old = call.arguments["size_average"], call.arguments["reduce"]
    known = reduction in {"mean", "sum", "none"} and old == (None, None)
    recipe = lazy.recipe
    rows = recipe.hidden.shape[:-1]
    fits = target.dtype == torch.int64 and target.shape == rows
    if not (known and fits and (len(rows) <= 1 or recipe.swapped)):
        return None
    lazy.require_inputs()
    rules = Rules(
        weight, call.arguments["ignore_index"], reduction, call.arguments["label_smoothing"]
    )
    hidden = recipe.hidden.reshape(-1, recipe.hidden.shape[-1])
    with torch.set_grad_enabled(lazy.in_graph and torch.is_grad_enabled()):
        loss = chunked_cross_entropy(hidden, recipe.projection, target.reshape(-1), rules)
    if reduction == "none":
        loss = loss.view(target.shape)
    for gate in lazy.gates if loss.requires_grad else ():
        loss.register_hook(gate)  # type: ignore[no-untyped-call]
    return loss


def _is_question(func: Callable[..., Any]) -> bool:
    name: str = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in _PROPERTIES
    return name in _QUESTIONS


def _writes(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    name: str = getattr(func, "__name__", "")
    inplace = name.endswith("_") and not name.endswith("__")
    return inplace or name in {"__setitem__", "__set__"} or kwargs.get("out") is not None


def _computed(value: Any) -> Any:
    return value.materialize() if isinstance(value, LazyLogits) else value


def _values(value: Any) -> Any:
    """Numbers without a graph: these calls are in it already, behind :class:`_Deferred`."""
    if not isinstance(value, LazyLogits):
        return value
    if value.computed is None:
        value.require_inputs()
        with torch.no_grad():
            return value.recipe.compute()
    if value.requires_grad and value.computed._version:
        raise ModelError("logits that were changed in place cannot be read by C++ code")
    return value.computed.detach()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
