"""Checkpoints that no run of core has saved: their names, in terms of the state that is filled.

Such a checkpoint has one model, ``model.``, and one optimizer, ``optim.``, as torch's own state dicts
are named; a state calls them as it likes, and may have several optimizers for one model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from core.checkpoints.state import State, split
from core.checkpoints.values import Encoded
from core.errors import CheckpointError

MODEL, OPTIMIZER = "model.", "optim."
_HYPER = ".param_groups."


@dataclass(frozen=True)
class Translation:
    """A foreign checkpoint under the names of a state.

    Attributes:
        saved: names of all its tensors.
        values: its encoded plain values.
        original: the checkpoint's own name of every tensor in ``saved``.
        kept: names of hyper-parameters that the checkpoint lacks; those of the state stay.
        unknown: names of hyper-parameters that the state's optimizers do not have.
    """

    saved: Set[str]
    values: Mapping[str, Encoded]
    original: Mapping[str, str] = field(default_factory=dict)
    kept: Set[str] = frozenset()
    unknown: Set[str] = frozenset()

    def remarks(self) -> list[str]:
        """What the user should know."""
        found = []
        if self.kept:
            found.append(f"it does not say {_sorted(self.kept)}: the optimizer's own stay")
        if self.unknown:
            found.append(f"it says {_sorted(self.unknown)}: no optimizer of the state has that")
        return found


def translate(state: State, saved: Iterable[str], values: Mapping[str, Encoded]) -> Translation:
    """Bring the names of a foreign checkpoint into those of ``state``.

    Args:
        state: the live objects.
        saved: names of all tensors in the checkpoint.
        values: its encoded plain values.

    Raises:
        CheckpointError: when the state has several models.
    """
    parts = _parts(state)
    live = split({name: part for name, part in state.items() if name in parts})
    names = {_foreign(name, parts): name for name in [*live.tensors, *live.values]}
    original = {names.get(name) or _stranger(name, parts): name for name in saved}
    known = {names.get(name) or _stranger(name, parts): value for name, value in values.items()}
    strange = {n for n in [*original, *known] if _HYPER in n and n not in live.values}
    original = {name: own for name, own in original.items() if name not in strange}
    known = {name: value for name, value in known.items() if name not in strange}
    hyper = (name for name in live.values if _HYPER in name and name not in known)
    lacking = {name: live.values[name] for name in hyper}
    # A state without optimizers has no use for any of them, and that is no news.
    unknown = _last(strange) if any(isinstance(part, Optimizer) for part in state.values()) else ()
    return Translation(set(original), known | lacking, original, _last(lacking), set(unknown))


def _last(names: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def _sorted(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _parts(state: State) -> dict[str, tuple[str, str]]:
    """Own and foreign prefix of every model and optimizer, by name."""
    models = [name for name, part in state.items() if isinstance(part, nn.Module)]
    if len(models) > 1:
        raise CheckpointError(
            f"the state has several models: {', '.join(models)}",
            why="a checkpoint of another program has one",
            fix="load them one after the other",
        )
    found = {name: (f"{name}.", MODEL) for name in models}
    optimizers = [name for name, part in state.items() if isinstance(part, Optimizer)]
    return found | {name: (f"{name}.", OPTIMIZER) for name in optimizers}


def _owner(name: str, parts: Mapping[str, tuple[str, str]]) -> str:
    return next(part for part, (own, _) in parts.items() if name.startswith(own))


def _foreign(name: str, parts: Mapping[str, tuple[str, str]]) -> str:
    own, foreign = parts[_owner(name, parts)]
    return foreign + name.removeprefix(own)


def _stranger(name: str, parts: Mapping[str, tuple[str, str]]) -> str:
    """The name of something that the state does not have, so that a message can tell of it."""
    for own, foreign in parts.values():
        if name.startswith(foreign):
            return own + name.removeprefix(foreign)
    return name


def renamed(tensors: Mapping[str, Tensor], translation: Translation) -> dict[str, Any]:
    """Tensors that are filled, under the checkpoint's own names."""
    return {translation.original.get(name, name): tensor for name, tensor in tensors.items()}
