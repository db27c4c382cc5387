"""What all modules with six-bit weights share: three tensors for each weight, in two layouts.

A module computes with the layout of kernels; its state dict has the natural one, always. It holds
one of the two: weights are repacked where they enter and where they leave, and nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from core.errors import ModelError
from core_fp6.layouts import natural
from core_fp6.models.sharding import Cut, assembled, cut_of, here, like, without_lead
from core_fp6.weights.packed import Layout, Packed
from core_fp6.weights.scaling import Scheme

HIGH, SCALE = "_hi", "_scale"
"""What is added to the name of a weight for its high plane and for its scales."""
Module = TypeVar("Module", bound=nn.Module)


def parts_of(name: str) -> tuple[str, str, str]:
    """Names of the low plane, the high plane and the scales of a weight."""
    return name, name + HIGH, name + SCALE


class SixBit(nn.Module):
    """A module whose weights are planes and scales, as parameters that are not trained.

    Attributes:
        scheme: of all weights.
        columns: how many columns each weight has, by the name of its low plane.
        cuts: which of them are on this rank.
        layout: of the planes that are held.
    """

    scheme: Scheme
    columns: dict[str, int]
    cuts: dict[str, Cut]
    layout: Layout

    def begin(self, scheme: Scheme) -> None:
        """Start without weights; called once, before :meth:`add` and :meth:`hold`."""
        self.scheme, self.layout = scheme, "natural"
        self.columns, self.cuts = {}, {}

    def add(self, name: str, shape: torch.Size, device: Any = None) -> None:
        """Make room for a weight ``[..., rows, columns]``, in natural layout."""
        low, high = natural.planes_shape(shape[-1])
        self._count(name, shape[-1])
        sizes = (*shape[:-1], low), (*shape[:-1], high), self.scheme.scale_shape(shape)
        dtypes = torch.uint8, torch.uint8, self.scheme.scale_dtype
        for part, size, dtype in zip(parts_of(name), sizes, dtypes, strict=True):
            self._put(part, torch.empty(size, dtype=dtype, device=device))

    def hold(self, name: str, weight: Packed) -> None:
        """Take a weight over, in the layout of kernels; the first one decides the layout."""
        self.layout = "execution"
        self._count(name, weight.columns)
        moved = weight.to("execution")
        for part, tensor in zip(parts_of(name), (moved.low, moved.high, moved.scale), strict=True):
            self._put(part, tensor)

    def packed(self, name: str = "weight") -> Packed:
        """A weight as kernels take it.

        Raises:
            ModelError: while the planes are in natural layout.
        """
        if self.layout != "execution":
            raise ModelError(
                "a module with six-bit weights is not ready",
                why="its planes are as on disk, not as kernels take them",
                fix="call core_fp6.prepare(model) once after its weights are set",
            )
        return self._held(name)

    def led(self, x: Tensor, name: str = "weight") -> Tensor:
        """An input of the columns that are here, as :meth:`packed` wants it."""
        lead = self.cuts[name].lead(self.scheme)
        return pad(x, (lead, 0)) if lead else x

    def dequantized(self, name: str = "weight", dtype: torch.dtype = torch.float32) -> Tensor:
        """A weight ``[..., rows, columns]``, or the columns of it that are here."""
        lead = self.cuts[name].lead(self.scheme) if self.layout == "execution" else 0
        return self._held(name).dequantize(dtype)[..., lead:]

    def prepare(self, path: str = "") -> None:
        """Repack what was loaded for kernels; nothing where that is done.

        Args:
            path: of this module in its model, for errors.

        Raises:
            ModelError: when planes or scales cannot be those of the weight.
        """
        if self.layout == "execution":
            return
        start = f"{path}." if path else ""
        if self._is_meta():
            raise ModelError(
                f"{path or 'a module with six-bit weights'} has no values",
                why="they are on the meta device, or offloaded to another one",
                fix="place the model on accelerators only, or on the CPU only",
            )
        for name, columns in self.columns.items():
            self.cuts[name] = cut_of(getattr(self, name), columns, start + name)
        ready = {name: self._ready(name, vars(self)["_parameters"], start) for name in self.columns}
        for name, tensors in ready.items():
            for part, tensor in zip(parts_of(name), tensors, strict=True):
                self._put(part, tensor)
        self.layout = "execution"

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Refuse to train six-bit weights.

        Raises:
            ModelError: when ``requires_grad`` is true.
        """
        if requires_grad:
            raise ModelError(
                "six-bit weights cannot be trained",
                why="codes have no gradient",
                fix="train adapters on top of them (LoRA), or dequantize the model first",
            )
        return super().requires_grad_(False)

    def _count(self, name: str, columns: int) -> None:
        self.columns[name], self.cuts[name] = columns, Cut(0, columns, columns)

    def _put(self, part: str, tensor: Tensor) -> None:
        self.register_parameter(part, nn.Parameter(tensor, requires_grad=False))

    def _held(self, name: str) -> Packed:
        low, high, scale = (here(getattr(self, part)) for part in parts_of(name))
        cut = self.cuts[name]
        columns = cut.count
        if self.layout == "execution":
            columns += cut.lead(self.scheme)
            scale = cut.scales(self.scheme, scale) if cut.splits_groups(self.scheme) else scale
        # What changes the dtype of all parameters from outside, as preparing a model for adapters
        # may, made the scales wider and changed none.
        scale = scale.to(self.scheme.scale_dtype)
        return Packed(low, high, scale, self.scheme, columns, self.layout)

    def _ready(self, name: str, given: Mapping[str, Any], prefix: str) -> tuple[Tensor, ...]:
        """Planes as kernels take them and scales, of natural ones that came from outside."""
        low, high, scale = (cast(Tensor, given[part]) for part in parts_of(name))
        cut = self.cuts[name]
        moved = self._assembled(name, given, prefix).to("execution")
        if cut.splits_groups(self.scheme) or (not cut.is_whole() and not self.scheme.group_size):
            kept = scale
        else:
            kept = like(scale if cut.is_whole() else low, moved.scale)
        return like(low, moved.low), like(high, moved.high), kept

    def _assembled(self, name: str, given: Mapping[str, Any], prefix: str) -> Packed:
        low, high, scale = (here(given[part]) for part in parts_of(name))
        return assembled(low, high, scale, self.scheme, self.cuts[name], prefix + name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {
            part: getattr(self, part).data for name in self.columns for part in parts_of(name)
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for part, old in before.items():
            new = getattr(self, part)
            # Another dtype of the model, as in model.to(torch.bfloat16), is not one of its codes
            # and scales: they would be other weights.
            if new.dtype != old.dtype:
                self._put(part, old.to(new.device))
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout == "natural":
            return
        for name in self.columns:
            low, high = without_lead(self._held(name).to("natural"), self.cuts[name])
            scale = cast(Tensor, getattr(self, name + SCALE)).detach()
            tensors = (
                like(getattr(self, name), low),
                like(getattr(self, name + HIGH), high),
                scale.to(self.scheme.scale_dtype),
            )
            for part, tensor in zip(parts_of(name), tensors, strict=True):
                destination[prefix + part] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {name: self._given(state_dict, prefix, name) for name in self.columns}
        try:
            complete = [self._take(state_dict, prefix, name) for name, has in given.items() if has]
        except ModelError as error:
            error_msgs.append(str(error))
            return
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        if len(complete) == len(self.columns) and not self._is_meta():
            self.prepare(prefix.removesuffix("."))

    def _given(self, state_dict: dict[str, Any], prefix: str, name: str) -> bool:
        return any(prefix + part in state_dict for part in parts_of(name))

    def _take(self, state_dict: dict[str, Any], prefix: str, name: str) -> str:
        """Check a weight of a state dict and bring it into the layout that is held."""
        keys = [prefix + part for part in parts_of(name)]
        missing = [key for key in keys if key not in state_dict]
        if missing:
            raise ModelError(
                f"{prefix}{name} is not complete",
                why=f"{' and '.join(missing)} is missing",
                fix="load the planes and the scales of a weight together",
            )
        given = {part: state_dict[key] for part, key in zip(parts_of(name), keys, strict=True)}
        if self.layout == "natural":
            self._assembled(name, given, prefix)
        else:
            state_dict.update(zip(keys, self._ready(name, given, prefix), strict=True))
        return name

    def _is_meta(self) -> bool:
        return any(getattr(self, name).is_meta for name in self.columns)


def sixbit_modules(model: nn.Module) -> Iterator[tuple[str, SixBit]]:
    """All modules with six-bit weights, by their names."""
    for name, module in model.named_modules():
        if isinstance(module, SixBit):
            yield name, module


def prepare(model: Module) -> Module:
    """Repack all six-bit weights of a model for kernels, in place, one module at a time.

    For models whose parameters were set one by one; everything else that makes or loads modules
    with six-bit weights does it by itself.

    Raises:
        ModelError: naming the weight whose planes or scales cannot be right.
    """
    for name, module in sixbit_modules(model):
        module.prepare(name)
    return model
