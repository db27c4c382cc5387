"""Six-bit weights for a model that is in memory, and back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from core.errors import ModelError
from core_fp6.models.experts import FP6Experts
from core_fp6.models.linear import FP6Linear
from core_fp6.models.report import Report
from core_fp6.models.selecting import ALREADY, Selection, select, weights_of
from core_fp6.models.sixbit import SixBit, parts_of, sixbit_modules
from core_fp6.weights.numbers import Format, parse
from core_fp6.weights.packed import require_six_bits
from core_fp6.weights.scaling import Scheme, require_finite

Module = TypeVar("Module", bound=nn.Module)
Scales = Callable[[str, Tensor, Scheme], Tensor | None] | Mapping[str, Tensor]
"""Scales by the name of a weight: a mapping, or a function of the name, the weight and the scheme.
Where there are none, those that fit the largest magnitudes are taken."""


class Calibration(Protocol):
    """What was seen of the inputs of the weights, as ``calibrate`` gives it."""

    @property
    def unseen(self) -> dict[str, list[int]]: ...

    def weights(self, name: str) -> Tensor | None: ...


def quantize(
    model: nn.Module,
    format: str | Format = "e2m3",
    group_size: int = 128,
    skip: Sequence[str] = (),
    *,
    calibration: Calibration | None = None,
    scales: Scales | None = None,
) -> Report:
    """Give a model six-bit weights, in place.

    All weights are rounded before the first module is exchanged, so a model that is refused is as
    it was, and the memory needed is that of the model and of the packed weights. Load with
    ``quantization_config=FP6Config()`` to need that of the packed weights and one tensor.

    Args:
        model: a model of transformers, or any other with linear modules.
        format: ``e2m3`` or ``e3m2``.
        group_size: columns that share a scale: 32, 64, 128 or 256, or 0 for one scale per row.
        skip: modules to leave out beside output layers, embeddings and routers; see
            :func:`core_fp6.models.selecting.select`.
        calibration: what was seen of the inputs: scales are searched that keep the outputs.
        scales: scales that were found elsewhere.

    Returns:
        What was done and what was left out.

    Raises:
        ModelError: for NaN or infinities, with the parameter and their number; when nothing can be
            quantized, or something is already.
        SettingsError: for another format or group size, or a pattern that matches nothing.
    """
    scheme = Scheme(parse(format) if isinstance(format, str) else format, group_size)
    require_six_bits(scheme.format)
    selection = select(model, skip)
    _require_work(model, selection)
    for name, _, weight in selection.weights():
        require_finite(weight.detach(), name)
    find = _searched(calibration) if calibration is not None else scales
    made = {
        name: _converted(name, module, scheme, find) for name, module in selection.chosen.items()
    }
    before = stored_bytes(model)
    parameters = count_parameters(model)
    exchange(model, {id(module): made[name] for name, module in selection.chosen.items()})
    for integration in _integrations():
        integration.attach(model, scheme, skip, selection)
    return report(
        model,
        scheme,
        selection.left_out,
        parameters,
        before,
        calibration.unseen if calibration is not None else {},
    )


def dequantize(model: Module, dtype: torch.dtype | None = None) -> Module:
    """Give a model plain weights again, with the values that the codes stand for, in place.

    Args:
        model: what :func:`quantize` or ``from_pretrained`` made.
        dtype: of the weights; by default that of the first other parameter.

    Raises:
        ModelError: when it has no six-bit weights.
    """
    found = dict(sixbit_modules(model))
    if not found:
        raise ModelError("the model has no six-bit weights", fix="quantize it first")
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise ModelError(
            "a model that is cut over ranks is not dequantized",
            fix="load it on one rank, or save it and load it again",
        )
    dtype = dtype or _float_dtype(model)
    plain = {id(module): _plain(module, dtype) for module in found.values()}
    exchange(model, plain)
    for integration in _integrations():
        integration.forget(model)
    return model


def _integrations() -> Iterator[Any]:
    """What tells other libraries how the weights of their models are held now."""
    from core_fp6.integrations import transformers

    yield transformers
    if "diffusers.quantizers.auto" in sys.modules:
        from core_fp6.integrations import diffusers

        yield diffusers


def describe(model: nn.Module) -> Report:
    """What is six-bit of a model, however it became so; what it would be without is worked out.

    Raises:
        ModelError: when it has no six-bit weights.
    """
    modules = [module for _, module in sixbit_modules(model)]
    if not modules:
        raise ModelError("the model has no six-bit weights", fix="quantize it first")
    weights = sum(_stored(module, name)[0] for module in modules for name in module.columns)
    stored = sum(_stored(module, name)[1] for module in modules for name in module.columns)
    own = _planes(model)
    others = sum(p.numel() for p in model.parameters() if id(p) not in own)
    selection = select(model)
    left_out = {n: why for n, why in selection.left_out.items() if why != ALREADY}
    left_out |= dict.fromkeys(selection.chosen, "not quantized")
    before = stored_bytes(model) - stored + weights * _float_dtype(model).itemsize
    return report(model, modules[0].scheme, left_out, weights + others, before)


def report(
    model: nn.Module,
    scheme: Scheme,
    left_out: dict[str, str],
    parameters: int,
    bytes_before: int,
    unseen: dict[str, list[int]] | None = None,
) -> Report:
    """Describe a model that has six-bit weights."""
    quantized: dict[str, int] = {}
    weight_bytes = 0
    for name, module in sixbit_modules(model):
        natural = [_stored(module, part) for part in module.columns]
        quantized[name] = sum(count for count, _ in natural)
        weight_bytes += sum(size for _, size in natural)
    return Report(
        scheme,
        quantized,
        dict(left_out),
        parameters,
        bytes_before,
        stored_bytes(model),
        weight_bytes,
        dict(unseen or {}),
    )


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters as they lie on disk."""
    planes = _planes(model)
    sizes = (_stored(m, name)[1] for _, m in sixbit_modules(model) for name in m.columns)
    return sum(sizes) + sum(p.nbytes for p in model.parameters() if id(p) not in planes)


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model that is not quantized, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def _stored(module: SixBit, name: str) -> tuple[int, int]:
    """Weights of a six-bit weight, and their bytes on disk."""
    low, _, scale = (cast(Tensor, getattr(module, part)) for part in parts_of(name))
    rows = low.shape[:-1].numel()
    columns = module.columns[name]
    return rows * columns, rows * 3 * -(-columns // 4) + scale.nbytes


def _require_work(model: nn.Module, selection: Selection) -> None:
    if next(sixbit_modules(model), None) is not None:
        raise ModelError(
            "the model is quantized already",
            why="some of its modules have six-bit weights",
            fix="dequantize it first, or load the original",
        )
    if not selection.chosen:
        reasons = "; ".join(f"{name}: {why}" for name, why in selection.left_out.items())
        raise ModelError("there is nothing to quantize", why=reasons or "no module has a matrix")
    meta = [name for name, _, weight in selection.weights() if weight.is_meta]
    if meta:
        raise ModelError(
            f"{meta[0]} has no values",
            why="it is on the meta device",
            fix="load the model first, or give from_pretrained quantization_config=FP6Config()",
        )


def _converted(name: str, module: nn.Module, scheme: Scheme, scales: Scales | None) -> SixBit:
    found: dict[str, Tensor | None] = {}
    for part in weights_of(module):
        full = f"{name}.{part}".lstrip(".")
        weight = cast(nn.Parameter, getattr(module, part)).detach()
        found[part] = _scale(full, weight, scheme, scales)
    if isinstance(module, nn.Linear):
        return FP6Linear.from_linear(module, scheme, found["weight"], f"{name}.weight")
    return FP6Experts.from_experts(module, scheme, found, name)


def _scale(name: str, weight: Tensor, scheme: Scheme, scales: Scales | None) -> Tensor | None:
    if scales is None:
        return None
    found = scales.get(name) if isinstance(scales, Mapping) else scales(name, weight, scheme)
    if found is None:
        return None
    shape = scheme.scale_shape(weight.shape)
    good = found.shape == shape and found.dtype == scheme.scale_dtype
    if not (good and bool((torch.isfinite(found) & (found > 0)).all())):
        raise ModelError(
            f"the scales given for {name} are none",
            why=f"{scheme.name} takes positive {scheme.scale_dtype} {list(shape)}; "
            f"these are {found.dtype} {list(found.shape)}",
            fix="make them with search",
        )
    return found.to(weight.device)


def _searched(calibration: Calibration) -> Scales:
    from core_fp6.quality.searching import search

    return lambda name, weight, scheme: search(weight, scheme, calibration.weights(name), name)


def exchange(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put modules in the place of others, wherever those are held."""
    for owner in list(model.modules()):
        for name, child in list(vars(owner)["_modules"].items()):
            if id(child) in new:
                setattr(owner, name, new[id(child)])


def _plain(module: SixBit, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, FP6Linear):
        return module.to_linear(dtype)
    return cast(FP6Experts, module).to_experts(dtype)


def _float_dtype(model: nn.Module) -> torch.dtype:
    own = _planes(model)
    others = (p.dtype for p in model.parameters() if id(p) not in own and p.is_floating_point())
    return next(others, torch.float32)


def _planes(model: nn.Module) -> set[int]:
    """All parameters that are planes or scales, by their identity."""
    return {
        id(getattr(module, part))
        for _, module in sixbit_modules(model)
        for name in module.columns
        for part in parts_of(name)
    }
