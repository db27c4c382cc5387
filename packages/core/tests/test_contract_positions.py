"""A plugin that only brings a policy of positions keeps the contract."""

from __future__ import annotations

from typing import Any

from torch import nn

from core import MODEL, Hooks, Phase, Transform, hookimpl
from core.positions.install import positions_transform
from core.positions.policy import ModelPositions, Positions
from core.testing import contract
from core.testing.contract import Subject
from core.testing.fixtures import plugin_of


def per_request(model: nn.Module, run: Any) -> Positions:
    return ModelPositions(per_request=True)


def switches_by_hand(model: Any, run: Any) -> nn.Module:
    model.set_attn_implementation("eager")
    return model  # type: ignore[no-any-return]


class Policy(Hooks):
    """Brings a policy."""

    @hookimpl
    def core_transforms(self, run: Any) -> Any:
        yield positions_transform("positions", per_request)


class Thief(Hooks):
    """Claims positions and takes attention."""

    @hookimpl
    def core_transforms(self, run: Any) -> Any:
        yield Transform(
            stage=MODEL,
            name="positions",
            apply=switches_by_hand,
            phase=Phase.STRUCTURE,
            claims=frozenset({"positions"}),
        )


test_contract = contract.suite(
    "policy", areas=["transforms", "attention"], plugins=plugin_of(Policy(), "policy")
)


def test_a_switch_of_its_own_still_counts() -> None:
    (check,) = (c for c in contract.checks(["transforms"]) if c.name == "transforms.claims")
    subject = Subject("thief", plugin_of(Thief(), "thief"))
    (found,) = contract.run_checks(subject, [check])
    assert (found.status, "changes attention of" in found.text) == ("fail", True), found
