"""All kinds of checkpoints that can be made, and the settings that each of them heeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from core_ucp.view.keys import MODEL

if TYPE_CHECKING:
    from core_ucp.settings import UcpSettings
    from core_ucp.targets.target import Target
    from core_ucp.view.view import View


def target_of(name: str, view: View, settings: UcpSettings) -> Target:
    """Lay out a target of the kind ``name`` for everything that a view holds.

    Raises:
        CheckpointError: when the view cannot be brought into that form.
    """
    return _BUILDERS[name](view, settings)


def _universal(view: View, settings: UcpSettings) -> Target:
    from core_ucp.targets.universal import UniversalOptions, build

    return build(view, UniversalOptions(_limit(settings)))


def _dcp(view: View, settings: UcpSettings) -> Target:
    from core_ucp.targets.dcp import DcpOptions, build

    return build(view, DcpOptions(_limit(settings)))


def _huggingface(view: View, settings: UcpSettings) -> Target:
    from core_ucp.targets.huggingface import HuggingFaceOptions, build

    config = Path(settings.config) if settings.config else None
    return build(view, HuggingFaceOptions(_dtype(settings), config, _limit(settings)))


def _megatron(view: View, settings: UcpSettings) -> Target:
    from core_ucp.targets.megatron import MegatronOptions, build

    multiple = settings.vocabulary_multiple
    return build(
        view,
        MegatronOptions(_dtype(settings), vocabulary_multiple=multiple, limit=_limit(settings)),
    )


def _deepspeed(view: View, settings: UcpSettings) -> Target:
    from core_ucp.targets.deepspeed import DeepSpeedOptions, build

    options = DeepSpeedOptions(
        stage=settings.stage,
        world_size=settings.world_size,
        dtype=_computed_in(view) if settings.dtype == "source" else _PRECISIONS[settings.dtype],
        order=settings.order,
        frozen=settings.frozen,
        buffers=settings.buffers,
    )
    return build(view, options)


Precision = Literal["bf16", "fp16", "fp32"]
_PRECISIONS: Mapping[str, Precision] = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
}


def _computed_in(view: View) -> Precision:
    """What a source computes in: as it says, or as most of its weights are."""
    for precision in _PRECISIONS.values():
        if view.details.get("precision") == precision:
            return precision
    weights = {key: atom for key, atom in view.atoms.items() if key.startswith(MODEL)}
    found = Counter(str(view.twins.get(key, atom).dtype) for key, atom in weights.items())
    name = found.most_common(1)[0][0].removeprefix("torch.") if found else "float32"
    return _PRECISIONS.get(name, "fp32")


def _limit(settings: UcpSettings) -> int:
    return int(settings.shard_size * 2**30)


def _dtype(settings: UcpSettings) -> torch.dtype | None:
    found: torch.dtype | None = getattr(torch, settings.dtype, None)
    return found


_BUILDERS: Mapping[str, Callable[[View, UcpSettings], Target]] = {
    "universal": _universal,
    "torch-dcp": _dcp,
    "huggingface": _huggingface,
    "megatron": _megatron,
    "deepspeed": _deepspeed,
}
