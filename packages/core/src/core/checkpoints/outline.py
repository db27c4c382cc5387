"""Taking the same objects apart again: quickly, as long as their structure has not changed.

Torch finds the names of a model's tensors and of an optimizer's state by walking all of it, which takes
longer than writing a small checkpoint. Where every name leads back to one place in the live objects, the
places are remembered. They are looked up anew each time, so a replaced tensor is never missed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class Outlines:
    """What is remembered of modules and optimizers; it keeps none of them alive."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Any, _Module | _Optimizer] = WeakKeyDictionary()

    def again(self, part: nn.Module | Optimizer, owner: nn.Module) -> dict[str, Any] | None:
        """The leaves of a part by name, or ``None`` where it is new or has changed.

        Args:
            part: a module or an optimizer.
            owner: the module whose parameters an optimizer steps; a module itself.
        """
        known = self._known.get(part)
        if isinstance(known, _Optimizer):
            model = self._known.get(owner)
            same = isinstance(model, _Module) and model.tensors() == known.model
            return known.leaves(part) if same else None
        return None if known is None else known.leaves(part)

    def parameters(self, part: nn.Module) -> set[str] | None:
        """Names of the leaves of a module that are parameters; ``None`` for one not remembered."""
        known = self._known.get(part)
        return known.parameters if isinstance(known, _Module) else None

    def learn(
        self, part: nn.Module | Optimizer, found: Mapping[str, Any], owner: nn.Module
    ) -> None:
        """Remember where the leaves of a part are, if each has one place.

        Args:
            part: the object that was taken apart.
            found: its leaves by name.
            owner: the module whose parameters an optimizer steps; a module itself.
        """
        self._known.pop(part, None)
        if isinstance(part, nn.Module):
            # Hooks may do more than change values: those of FSDP2 put shards back in their places.
            places = None if any(map(_hooks, part.modules())) else _places(part, found)
            if places is not None:
                self._known[part] = _Module(part, places)
        elif (
            part.state
            and not _optimizer_hooks(part)
            and isinstance(model := self._known.get(owner), _Module)
        ):
            outline = _Optimizer(part, _names(owner, found), model.tensors())
            if _equal(outline.leaves(part), found):
                self._known[part] = outline


class _Module:
    """A module: by name the index of a submodule, and which of its tensors."""

    def __init__(self, part: nn.Module, places: Mapping[str, tuple[int, str, str]]) -> None:
        self._places = places
        self.parameters = {n for n, (_, kind, _) in places.items() if kind == "_parameters"}
        self._modules = [ref(module) for module in part.modules()]
        self._shape = tuple(_shape(part.modules()))

    def leaves(self, part: Any) -> dict[str, Any] | None:
        modules = [reference() for reference in self._modules]
        if any(module is None for module in modules) or tuple(_shape(modules)) != self._shape:
            return None
        tensors = self._find(modules)
        if any(tensor is None for tensor in tensors):
            return None
        return {n: t.detach() for n, t in zip(self._places, tensors, strict=True) if t is not None}

    def tensors(self) -> tuple[int, ...] | None:
        """Identities of the tensors that are there now; ``None`` for a module that is gone."""
        modules = [reference() for reference in self._modules]
        return None if None in modules else tuple(map(id, self._find(modules)))

    def _find(self, modules: list[nn.Module | None]) -> list[Tensor | None]:
        return [getattr(modules[i], kind).get(key) for i, kind, key in self._places.values()]


def _shape(modules: Any) -> Iterator[tuple[Any, ...]]:
    """What must not change: who is below whom, which tensors each has, and no hooks."""
    for module in modules:
        below = tuple(map(id, module._modules.values()))
        yield id(module), below, tuple(module._parameters), tuple(module._buffers), _hooks(module)


def _hooks(module: nn.Module) -> int:
    known = vars(module)
    return len(known["_state_dict_hooks"]) + len(known["_state_dict_pre_hooks"])


def _places(part: nn.Module, found: Mapping[str, Any]) -> dict[str, tuple[int, str, str]] | None:
    """The place of every leaf, or ``None`` where one is not found, or might be in several."""
    seen: defaultdict[tuple[Any, ...], list[tuple[str, tuple[int, str, str]]]] = defaultdict(list)
    numbers = {module: index for index, module in enumerate(part.modules())}
    for prefix, module in part.named_modules(remove_duplicate=False):
        for kind in ("_parameters", "_buffers"):
            for key, tensor in getattr(module, kind).items():
                if tensor is not None:
                    place = numbers[module], kind, key
                    for name in _names_of(f"{prefix}.{key}" if prefix else key):
                        seen[_identity(tensor)].append((name, place))
    places: dict[str, tuple[int, str, str]] = {}
    for name, leaf in found.items():
        same = seen.get(_identity(leaf), []) if isinstance(leaf, Tensor) else []
        named = {place for known, place in same if known == name}
        if len(named) != 1:
            return None
        places[name] = named.pop()
    return places


class _Optimizer:
    """An optimizer: its groups, and the names that a model gives to their parameters."""

    def __init__(
        self, part: Optimizer, names: Mapping[int, str], model: tuple[int, ...] | None
    ) -> None:
        self.model = model
        self._names = [[names.get(id(p), "") for p in g["params"]] for g in part.param_groups]
        self._shape = list(_groups(part))

    def leaves(self, part: Any) -> dict[str, Any] | None:
        if list(_groups(part)) != self._shape:
            return None
        found: dict[str, Any] = {}
        for group, names in zip(part.param_groups, self._names, strict=True):
            for parameter, name in zip(group["params"], names, strict=True):
                for key, value in part.state.get(parameter, {}).items():
                    found[f"state.{name}.{key}"] = value
                for key, value in group.items():
                    if key != "params":
                        found[f"param_groups.{name}.{key}"] = value
        return found


def _names(owner: nn.Module, found: Mapping[str, Any]) -> dict[int, str]:
    """Names of parameters by identity; of a tied one the name that the leaves have."""
    used = {key.rpartition(".")[0].removeprefix("param_groups.") for key in found}
    found_names: dict[int, str] = {}
    for name, parameter in owner.named_parameters(remove_duplicate=False):
        for candidate in _names_of(name):
            if candidate in used:
                found_names[id(parameter)] = candidate
    return found_names


def _optimizer_hooks(part: Optimizer) -> int:
    """How many hooks change its state dict; a wrapper, which has none itself, counts as one."""
    names = ("_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks")
    own = vars(part)
    return sum(len(own[name]) if name in own else 1 for name in names)


def _groups(part: Optimizer) -> Iterator[tuple[Any, ...]]:
    yield (_optimizer_hooks(part),)
    for group in part.param_groups:
        yield tuple(group), tuple((id(p), *part.state.get(p, ())) for p in group["params"])


def _equal(ours: Mapping[str, Any] | None, found: Mapping[str, Any]) -> bool:
    if ours is None or ours.keys() != found.keys():
        return False
    for name, value in found.items():
        if isinstance(value, Tensor):
            other = ours[name]
            if not isinstance(other, Tensor) or _identity(other) != _identity(value):
                return False
        elif ours[name] != value:
            return False
    return True


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.data_ptr(), local.shape, local.stride(), local.dtype, local.device


def _names_of(name: str) -> set[str]:
    """A name without what wrappers put into it: compile, checkpointing, and perhaps DDP around all."""
    plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    return {plain, plain.removeprefix("module.")}
