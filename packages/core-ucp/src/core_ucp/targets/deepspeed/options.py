"""What a DeepSpeed run that is to go on from a checkpoint looks like."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from core.errors import CheckpointError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Precisions that DeepSpeed computes in, as its configuration names them."""
_TAG = re.compile(r"[\w][\w.\-]*")


@dataclass(frozen=True)
class DeepSpeedOptions:
    """The run that loads the files. DeepSpeed takes them for no other.

    Attributes:
        stage: of ZeRO.
        world_size: data-parallel ranks.
        dtype: that the model computes in.
        tag: name of the checkpoint; ``global_step`` and the number of steps unless given.
        alignment: whether the run sets ``zero_optimization.parameter_alignment`` (stages 1 and 2).
        round_robin: whether it sets ``zero_optimization.round_robin_gradients`` (stages 1 and 2).
        sub_group_size: its ``zero_optimization.sub_group_size`` (stage 3).
        groups: parameter groups of its optimizer: those of the source, all parameters in one, or
            the names of each group's parameters in their order.
        order: names of the trained parameters in the order in which the run hands them to its
            optimizer, where the source does not know it.
        frozen: names of weights that the run does not train, where the source does not know.
        buffers: names of the model's buffers, where the source does not know.
        hyper: hyper-parameters that replace those of the source, or that it lacks.
        tensor_parallel: only 1.
        pipeline_parallel: only 1.
        expert_parallel: only 1.
    """

    stage: Literal[0, 1, 2, 3] = 1
    world_size: int = 1
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    tag: str = ""
    alignment: bool = False
    round_robin: bool = False
    sub_group_size: int = 1_000_000_000
    groups: Literal["as source", "one"] | tuple[tuple[str, ...], ...] = "as source"
    order: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    hyper: Mapping[str, Any] = field(default_factory=dict)
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: int = 1

    def __post_init__(self) -> None:
        degrees = (self.tensor_parallel, self.pipeline_parallel, self.expert_parallel)
        if degrees != (1, 1, 1):
            raise CheckpointError(
                "DeepSpeed checkpoints are made for data-parallel runs only",
                why="tensor-parallel {}, pipeline {} and expert {} ranks are asked for".format(
                    *degrees
                ),
                fix="set all three to 1",
            )
        wrong = [
            (self.stage not in (0, 1, 2, 3), f"there is no ZeRO stage {self.stage!r}"),
            (self.dtype not in DTYPES, f"{self.dtype!r} is none of bf16, fp16, fp32"),
            (self.world_size < 1, f"there are no runs of {self.world_size} ranks"),
            (self.sub_group_size < 1, f"a sub-group of {self.sub_group_size} holds nothing"),
            (bool(self.tag) and not _TAG.fullmatch(self.tag), f"{self.tag!r} is no tag"),
        ]
        for bad, why in wrong:
            if bad:
                raise CheckpointError("these options fit no run of DeepSpeed", why=why)

    @property
    def half(self) -> torch.dtype:
        """What weights are computed in."""
        return DTYPES[self.dtype]

    @property
    def whole(self) -> bool:
        """Whether the optimizer is that of torch itself, which also holds empty parameters."""
        return self.stage == 0 and self.dtype == "fp32"

    @property
    def parameter_align(self) -> int:
        """Elements that parameters begin at multiples of: 16 bytes with alignment, else one."""
        return 16 // self.half.itemsize if self.alignment else 1
