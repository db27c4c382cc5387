"""Lenses that give parameters other names."""

from __future__ import annotations

from dataclasses import dataclass, replace

from core_ucp.layout.lens import Lens, Parameters, replaced
from core_ucp.layout.names import Pattern, filled


@dataclass(frozen=True)
class Rename(Lens):
    """Parameters have other names; everything else stays.

    Args:
        match: pattern of the old names, such as ``"transformer.h.{n}.{rest**}"``.
        to: new name with the pattern's groups, such as ``"model.layers.{n}.{rest}"``.
        regex: whether ``match`` is a regular expression.
    """

    match: str
    to: str
    regex: bool = False

    @property
    def pattern(self) -> Pattern:
        """Pattern of the old names."""
        return Pattern(self.match, self.regex)

    def rename(self, name: str) -> str:
        groups = self.pattern.groups(name)
        return name if groups is None else filled(self.to, groups)

    def change(self, parameters: Parameters) -> Parameters:
        pattern = self.pattern
        old: list[list[str]] = []
        new: list[Parameters] = []
        for name, parameter in parameters.items():
            groups = pattern.groups(name)
            if groups is not None:
                target = filled(self.to, groups)
                old.append([name])
                new.append({target: replace(parameter, name=target)})
        return replaced(parameters, old, new)

    def inverse(self) -> Rename:
        pattern = self.pattern
        back = pattern.inverse(self.to)
        return Rename(back.text, pattern.template(), back.regex)
