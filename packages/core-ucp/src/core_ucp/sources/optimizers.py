"""The leaves of a saved optimizer: where they are, and which of them belong together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from core_ucp.files.trees import number
from core_ucp.view.files import Files
from core_ucp.view.view import Atom

_STATES = {
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "exp_avg_sq_row",
    "exp_avg_sq_col",
    "exp_inf",
    "momentum_buffer",
    "square_avg",
    "acc_delta",
    "sum",
    "step",
}
"""State tensors by which an optimizer is known that comes without its groups."""
_WHOLE = {"exp_avg", "momentum_buffer", "square_avg", "sum", "exp_avg_sq"}
"""State tensors of the shape of their parameter."""
_GROUPS = re.compile(r"(?:^|.*?\.)(?=param_groups(?:\.|$))")
_STATE = re.compile(r"(?:^|.*?\.)(?=state\..)")


@dataclass
class Optimizer:
    """The leaves of one optimizer: tensors by (parameter, state), groups and values by name."""

    states: dict[tuple[str, str], Atom] = field(default_factory=dict)
    groups: dict[int, dict[str, Any]] = field(default_factory=dict)
    hyper: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def numbered(self) -> bool:
        """Whether parameters are numbers and not names."""
        stepped = {name for name, _ in self.states}
        listed = {str(name) for g in self.groups.values() for name in g.get("params", [])}
        return all(name.isdecimal() for name in stepped or listed) and bool(stepped or listed)

    @property
    def tells_names(self) -> bool:
        """Whether its groups name the parameters that they number."""
        return bool(self.groups) and all("param_names" in group for group in self.groups.values())

    @property
    def shapes(self) -> dict[int, tuple[int, ...]]:
        """Shapes of numbered parameters, as their states show them."""
        found: dict[int, tuple[int, ...]] = {}
        for (name, state), atom in self.states.items():
            if state in _WHOLE or (int(name) not in found and atom.shape):
                found[int(name)] = atom.shape
        return found

    def add(self, files: Files, key: str, leaf: Any) -> None:
        """Put a leaf where it belongs.

        Args:
            files: that atoms refer to.
            key: without what stands before the optimizer.
            leaf: an atom, or a plain value.
        """
        section, _, rest = key.partition(".")
        parameter, _, name = rest.rpartition(".")
        if section == "state":
            if isinstance(leaf, Atom):
                self.states[parameter, name] = leaf
            else:
                self.hyper.setdefault(parameter, {})[name] = leaf
            return
        if section == key:
            self.groups |= dict(enumerate(leaf))
            return
        value = number(files, leaf) if isinstance(leaf, Atom) else leaf
        if parameter.isdecimal():
            self.groups.setdefault(int(parameter), {})[name] = value
        else:
            self.hyper.setdefault(parameter, {})[name] = value


def find_optimizers(
    files: Files, flat: Mapping[str, Any]
) -> tuple[dict[str, Optimizer], dict[str, Any]]:
    """Part a state into its optimizers and the rest.

    Args:
        files: that atoms refer to.
        flat: leaves by dotted key.

    Returns:
        the optimizers by what stands before their keys, and the leaves that belong to none.
    """
    roots = _roots(flat)
    optimizers = {root: Optimizer() for root in roots}
    rest: dict[str, Any] = {}
    for key, leaf in flat.items():
        root = next((r for r in roots if _belongs(key, r)), None)
        if root is None:
            rest[key] = leaf
        else:
            optimizers[root].add(files, key.removeprefix(root), leaf)
    return optimizers, rest


def _roots(flat: Mapping[str, Any]) -> list[str]:
    """Prefixes of the optimizers, the longest first."""
    found = {match.group() for key in flat if (match := _GROUPS.match(key))}
    for key, leaf in flat.items():
        match = _STATE.match(key)
        if match and isinstance(leaf, Atom) and key.rpartition(".")[2] in _STATES:
            found.add(match.group())
    return sorted(found, key=len, reverse=True)


def _belongs(key: str, root: str) -> bool:
    rest = key.removeprefix(root)
    return key.startswith(root) and (
        rest.startswith(("state.", "param_groups.")) or rest == "param_groups"
    )
