"""The DeepSpeed runs that tests are made from: one data class says all of a run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

MODELS = ("blocks", "llama", "gpt2", "pipeline", "moe")
"""What can be trained; see :mod:`ucp.deepspeed_models`."""


@dataclass(frozen=True)
class Case:
    """One run of DeepSpeed.

    Attributes:
        name: of the case.
        stage: of ZeRO.
        world: number of ranks.
        precision: ``bf16``, ``fp16`` or ``fp32``.
        model: one of :data:`MODELS`.
        optimizer: class of torch.optim, ``AdamW``, ``Adam`` or ``SGD``.
        groups: 2 for weights with and without decay, 1 for all in one group.
        tied: the head is the embedding.
        frozen: parts of the names of weights that are not trained.
        empty: one weight has no elements, which ZeRO-3 cannot run.
        width: of the feed-forward layers.
        heads: of attention.
        tp: tensor-parallel degree (AutoTP).
        pp: pipeline stages.
        ep: ranks that share the experts.
        zero: further settings of ``zero_optimization``.
        settings: further settings of the run.
        steps: before the checkpoint is saved.
        more: steps after it, which give the losses that a resumed run must have.
    """

    name: str
    stage: int = 1
    world: int = 2
    precision: str = "bf16"
    model: str = "blocks"
    optimizer: str = "AdamW"
    groups: int = 1
    tied: bool = False
    frozen: tuple[str, ...] = ()
    empty: bool = False
    width: int = 36
    heads: int = 2
    tp: int = 1
    pp: int = 1
    ep: int = 1
    zero: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int = 3
    more: int = 3

    def but(self, name: str, **changes: Any) -> Case:
        """The same run except for some things."""
        return replace(self, name=name, **changes)


_SUB_GROUPS = {"sub_group_size": 3000}

FAST = (
    Case("zero1-dp2", groups=2),
    Case("zero1-dp4-fp16", world=4, precision="fp16"),
    Case("zero2-round-robin", stage=2, world=3, zero={"round_robin_gradients": True}, groups=2),
    Case("zero3-dp2", stage=3, groups=2, zero=_SUB_GROUPS),
    Case("zero3-frozen", stage=3, world=3, frozen=("embed", "blocks.0."), tied=True),
    Case("stage0-fp32", stage=0, precision="fp32", groups=2),
    Case("zero1-autotp", model="llama", tp=2, width=37),
    Case("pipeline", model="pipeline", stage=1, world=2, pp=2, tied=True),
    Case("moe", model="moe", ep=2),
)
"""What the default run of the tests makes."""

SLOW = (
    Case("zero1-fp32", precision="fp32", empty=True),
    Case("zero1-tied", tied=True, world=3),
    Case("zero1-aligned", world=3, zero={"parameter_alignment": True}),
    Case("zero1-gpt2", model="gpt2", tied=True),
    Case("zero1-sgd", optimizer="SGD"),
    Case("zero1-elastic", zero={"elastic_checkpoint": True}, groups=2),
    Case(
        "zero1-overflow",
        precision="fp16",
        settings={"fp16": {"enabled": True, "initial_scale_power": 19, "hysteresis": 1}},
        steps=5,
    ),
    Case("zero2-frozen", stage=2, world=3, frozen=("embed", "blocks.0."), groups=2),
    Case("zero2-dp4-fp16", stage=2, world=4, precision="fp16", groups=2, tied=True),
    Case("zero3-dp4-fp32", stage=3, world=4, precision="fp32"),
    Case("zero3-fp16", stage=3, world=3, precision="fp16", groups=2),
    Case("zero3-sgd", stage=3, optimizer="SGD", groups=2),
    Case("zero3-llama", stage=3, world=2, model="llama"),
    Case("zero1-bf16-optimizer", settings={"data_types": {"grad_accum_dtype": "fp32"}}, groups=2),
    Case("stage0-frozen", stage=0, frozen=("blocks.0.",), groups=2),
    Case("stage0-bf16", stage=0, empty=True),
    Case("stage0-fp16", stage=0, precision="fp16", groups=2, tied=True),
    Case("stage0-sgd", stage=0, precision="fp32", optimizer="SGD"),
    Case("zero1-autotp-dp2", model="llama", world=4, tp=2, groups=2, width=32),
    Case("zero3-autotp", model="llama", stage=3, world=4, tp=2, width=37),
    Case("stage0-autotp", model="llama", stage=0, precision="fp32", tp=2),
    Case("pipeline-dp2", model="pipeline", stage=1, world=4, pp=2, tied=True),
    Case("pipeline-stage0", model="pipeline", stage=0, world=2, pp=2, precision="fp32"),
    Case("moe-dp4", model="moe", world=4, ep=2, stage=2),
    Case("moe-groups", model="moe", world=4, ep=2, groups=2),
    Case("moe-ep1", model="moe", ep=1),
    Case("moe-stage0", model="moe", world=2, ep=2, stage=0, precision="fp32"),
)
"""What tests marked as slow make."""

CASES = {case.name: case for case in FAST + SLOW}
"""All of them by name."""
