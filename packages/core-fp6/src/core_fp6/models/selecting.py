"""Which modules of a model get six-bit weights, and why the others do not."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, cast

import torch
from torch import nn
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from core.errors import SettingsError
from core_fp6.models import experts
from core_fp6.models.sixbit import SixBit

ALREADY = "already quantized"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_ROUTERS = {"gate", "router", "shared_expert_gate"}


@dataclass(frozen=True)
class Selection:
    """What is quantized of a model.

    Attributes:
        chosen: linear modules and experts, by the names of the modules.
        left_out: why each other module with a weight of two dimensions or more is not.
    """

    chosen: dict[str, nn.Module]
    left_out: dict[str, str]

    def weights(self) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
        """The weights that are quantized: name of the parameter, its module, the parameter."""
        for name, module in self.chosen.items():
            for part in weights_of(module):
                yield (
                    f"{name}.{part}".lstrip("."),
                    module,
                    cast(nn.Parameter, getattr(module, part)),
                )


def select_but(model: nn.Module, names: Collection[str]) -> Selection:
    """Choose what a checkpoint has quantized, which names what it has not.

    Args:
        model: the model the checkpoint is loaded into; with or without the head it was saved with.
        names: modules that are not quantized.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    known = {name.removeprefix(prefix) for name in names}
    chosen: dict[str, nn.Module] = {}
    left_out: dict[str, str] = {}
    for name, module in model.named_modules():
        if not _has_matrix(module):
            continue
        reason = kind_refused(module)
        if reason is None and name.removeprefix(prefix) in known:
            reason = "not quantized in the checkpoint"
        if reason is None:
            chosen[name] = module
        else:
            left_out[name] = reason
    return Selection(chosen, left_out)


def weights_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the weights of a chosen module."""
    return experts.names_of(module) if experts.is_experts(module) else ("weight",)


def select(model: nn.Module, skip: Sequence[str] = ()) -> Selection:
    """Choose what is quantized; nothing is changed, and the model may be on the meta device.

    Left out are output layers, tied weights, embeddings, routers, what the class of the model keeps
    in float32, adapters, and what ``skip`` matches.

    Args:
        model: a model of transformers, or any other.
        skip: modules to leave out as well, in the patterns of transformers: a name from the start
            to a dot, a regular expression, or the end of a name.

    Raises:
        SettingsError: when a pattern matches no module.
    """
    names = [name for name, _ in model.named_modules() if name]
    for pattern in skip:
        _require_match(pattern, names)
    rules = {
        "the output layer, or tied to it": _outputs(model),
        "the model keeps it in float32": sorted(
            getattr(model, "_keep_in_fp32_modules", None) or ()
        ),
        "skipped on request": skip,
    }
    shared = _shared(model)
    adapters = _adapters(model)
    chosen: dict[str, nn.Module] = {}
    left_out: dict[str, str] = {}
    for name, module in model.named_modules():
        if not _has_matrix(module):
            continue
        reason = kind_refused(module)
        if name in adapters:
            reason = "part of an adapter"
        elif not name:
            reason = "the model itself, which cannot be exchanged in place"
        elif reason is None:
            reason = _name_refused(name, rules) or _state_refused(module, shared)
        if reason is None:
            chosen[name] = module
        else:
            left_out[name] = reason
    return Selection(chosen, left_out)


def kind_refused(module: nn.Module) -> str | None:
    """Why a module with a matrix cannot be quantized by what it is, or None where it can."""
    if isinstance(module, SixBit):
        return ALREADY
    if experts.is_experts(module):
        return experts.refusal(module)
    if isinstance(module, nn.Embedding):
        return "an embedding"
    # A class derived from nn.Linear may compute something else with its weight.
    return None if type(module) is nn.Linear else f"no linear layer: {type(module).__name__}"


def _name_refused(name: str, rules: dict[str, Sequence[str]]) -> str | None:
    if name.rpartition(".")[2] in _ROUTERS:
        return "a router"
    for reason, patterns in rules.items():
        if not should_convert_module(name, list(patterns)):
            return reason
    return None


def _state_refused(module: nn.Module, shared: dict[int, list[str]]) -> str | None:
    for part in weights_of(module):
        weight = cast(nn.Parameter, getattr(module, part))
        others = shared.get(id(weight), [])
        if len(others) > 1:
            return f"a weight shared by {' and '.join(others)}"
        if type(weight.data) is not torch.Tensor:
            return f"a weight held as {type(weight.data).__name__}"
        if weight.dtype not in _DTYPES:
            return f"a weight in {weight.dtype}"
    held = vars(module)
    if "forward" in held or held["_forward_hooks"] or held["_forward_pre_hooks"]:
        return "hooks on it, which would be lost"
    return None


def _outputs(model: nn.Module) -> list[str]:
    from transformers import PreTrainedModel

    return get_keys_to_not_convert(model) if isinstance(model, PreTrainedModel) else []


def _has_matrix(module: nn.Module) -> bool:
    return any(weight.ndim > 1 for weight in module.parameters(recurse=False))


def _shared(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for weight in module.parameters(recurse=False):
            owners[id(weight)].append(name)
    return owners


def _adapters(model: nn.Module) -> set[str]:
    """Names of modules that adapters of peft added."""
    found: set[str] = set()
    for name, module in model.named_modules():
        for part in cast(Any, getattr(module, "adapter_layer_names", ())):
            inner = getattr(module, part, None)
            if isinstance(inner, nn.Module):
                start = f"{name}.{part}"
                found.update(f"{start}.{n}" if n else start for n, _ in inner.named_modules())
    return found


def _require_match(pattern: str, names: Sequence[str]) -> None:
    try:
        found = any(not should_convert_module(name, [pattern]) for name in names)
    except re.error as error:
        raise SettingsError(
            f"skip has {pattern!r}", why=f"it is no pattern: {error}", fix="name a module"
        ) from None
    if not found:
        ends = sorted({name.rpartition(".")[2] for name in names})
        near = get_close_matches(pattern, [*ends, *names], n=3, cutoff=0.5)
        raise SettingsError(
            f"skip has {pattern!r}",
            why="no module of the model matches it",
            fix=f"did you mean {', '.join(map(repr, near))}?" if near else "leave it out",
        )
