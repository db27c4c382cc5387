"""Moments of a run that plugins may observe; a closed union, to be taken apart with ``match``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RunStarted:
    """The run is validated and planned; nothing was changed yet."""


@dataclass(frozen=True, kw_only=True)
class StepEnded:
    """An optimizer step ended.

    Args:
        step: number of optimizer steps done so far; the first step ends with 1.
        metrics: figures of this step, such as ``loss`` in nats per token.
    """

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved:
    """A checkpoint is durable at ``path``."""

    step: int
    path: Path


@dataclass(frozen=True, kw_only=True)
class RunEnded:
    """The run is over; ``error`` is empty when it went well."""

    error: str = ""


Event = RunStarted | StepEnded | CheckpointSaved | RunEnded
