"""Runs of DeepSpeed that go on from checkpoints of other runs, by way of a conversion."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ucp.deepspeed_cases import CASES, Case
from ucp.deepspeed_runs import Resumed, Saved

from core_ucp.execution.copying import execute
from core_ucp.execution.planning import plan
from core_ucp.sources.deepspeed import open_view
from core_ucp.targets.deepspeed import DeepSpeedOptions, build
from core_ucp.view.view import View

SOURCES = CASES | {
    case.name: case
    for case in (
        Case("zero1-dp4", world=4, groups=2),
        Case("zero1-tied-frozen", tied=True, frozen=("blocks.0.",), groups=2),
        Case("stage0-fp32-empty", stage=0, precision="fp32", empty=True),
        Case("zero3-dp4", stage=3, world=4, groups=2),
    )
}


@dataclass(frozen=True)
class Change:
    """A run, and the run that goes on from its checkpoint.

    Attributes:
        source: name of the case that has saved.
        stage: of ZeRO that goes on.
        world: ranks that go on.
        same: whether that is the same run, whose losses must be the same bits.
        precision: that goes on; that of the source unless given.
        zero: further settings of ZeRO.
    """

    source: str
    stage: int
    world: int
    same: bool = False
    precision: str = ""
    zero: dict[str, Any] = field(default_factory=dict)

    @property
    def case(self) -> Case:
        """The run that goes on."""
        saved = SOURCES[self.source]
        return saved.but(
            f"{self.source}-then-zero{self.stage}-dp{self.world}",
            stage=self.stage,
            world=self.world,
            tp=1,
            precision=self.precision or saved.precision,
            zero=saved.zero if self.same else self.zero,
        )

    @property
    def runs(self) -> bool:
        """Whether DeepSpeed can run it at all: stage 3 stops at weights without elements."""
        return self.stage < 3 or not SOURCES[self.source].empty

    @property
    def comparable(self) -> bool:
        """Whether runs of these two stages train alike.

        Without ZeRO, DeepSpeed clips gradients of fp16 in another way: of two undisturbed runs that
        start from the same weights, the second losses already differ.
        """
        without = (SOURCES[self.source].stage == 0, self.stage == 0)
        return self.case.precision != "fp16" or without[0] == without[1]

    @property
    def options(self) -> DeepSpeedOptions:
        """What is asked of the converter."""
        case = self.case
        settings: dict[str, Any] = {
            "alignment": case.zero.get("parameter_alignment", False),
            "round_robin": case.zero.get("round_robin_gradients", False),
        }
        if "sub_group_size" in case.zero:
            settings["sub_group_size"] = case.zero["sub_group_size"]
        return DeepSpeedOptions(
            stage=self.stage, world_size=self.world, dtype=case.precision, **settings
        )

    def __str__(self) -> str:
        kinds = "".join(f"-{key}" for key in self.zero)
        precision = f"-{self.precision}" if self.precision else ""
        return f"{self.source}-to-zero{self.stage}-dp{self.world}{precision}{kinds}"


def write(view: View, options: DeepSpeedOptions, folder: Path) -> Path:
    """Make a checkpoint for a run that goes on."""
    target = build(view, options)
    folder.mkdir()
    execute(plan(view, target), folder)
    return folder


def convert(saved: Saved, options: DeepSpeedOptions, folder: Path) -> Path:
    """Make a checkpoint from that of another run."""
    return write(open_view(saved.folder), options, folder)


def require_state(saved: Saved, resumed: Resumed, halves: bool) -> None:
    """Make sure that DeepSpeed has loaded every bit of what was saved."""
    truth, loaded = saved.truth(), resumed.loaded()
    wanted = {key for key in truth if halves or not key.startswith("half.")}
    assert wanted <= loaded.keys()
    assert [key for key in sorted(wanted) if not torch.equal(truth[key], loaded[key])] == []
