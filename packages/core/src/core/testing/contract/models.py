"""Model families: every preset builds, also without memory for its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from core.contributions import ModelFamily
from core.errors import CoreError
from core.testing.contract.check import Skip, checks_of, require
from core.testing.contract.subject import Subject


def presets(subject: Subject) -> None:
    """Every preset builds a module on the meta device."""
    for family in _families(subject):
        require(family.presets, f"the family {family.name!r} has no presets")
        for preset in family.presets:
            with torch.device("meta"):
                built: Any = family.build(preset, {})
            what = f"{family.name}:{preset}"
            require(isinstance(built, nn.Module), f"{what} is a {type(built).__name__}, no module")
            require(any(True for _ in built.parameters()), f"{what} has no parameters")


def unknown_override(subject: Subject) -> None:
    """A configuration field that does not exist is refused with one clear error."""
    for family in _families(subject):
        what = f"{family.name}:{family.presets[0]}"
        try:
            with torch.device("meta"):
                family.build(family.presets[0], {"no_such_field_of_anybody": 1})
        except CoreError:
            continue
        except Exception as error:
            kind = type(error).__name__
            raise AssertionError(
                f"{what} raises {kind} for an unknown field, no CoreError"
            ) from None
        raise AssertionError(f"{what} ignores an unknown configuration field")


def _families(subject: Subject) -> list[ModelFamily]:
    if not subject.models:
        raise Skip("the plugin has no model families")
    return subject.models


CHECKS = checks_of("models", presets, unknown_override)
