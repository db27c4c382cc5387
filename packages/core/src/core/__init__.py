"""A thin plugin host for training and serving large PyTorch models.

Everything public is imported here on first use, so that ``import core`` loads nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "core.contributions": (
        "BATCH",
        "MODEL",
        "PIPELINE",
        "CheckpointFormat",
        "Converter",
        "Description",
        "EngineType",
        "ModelFamily",
        "ParameterRules",
        "Phase",
        "Probe",
        "Reading",
        "Recipe",
        "Row",
        "Settings",
        "Stage",
        "Step",
        "Storage",
        "Transform",
    ),
    "core.discovery": ("discover",),
    "core.engines": (
        "Completion",
        "Constraint",
        "Engine",
        "EngineStats",
        "Request",
        "Sampling",
        "Token",
        "generate",
    ),
    "core.errors": (
        "CheckpointError",
        "CoreError",
        "DataError",
        "EngineError",
        "ModelError",
        "PlanError",
        "PluginError",
        "SettingsError",
    ),
    "core.events": ("CheckpointSaved", "Event", "RunEnded", "RunStarted", "StepEnded"),
    "core.hooks": ("API", "Hooks", "hookimpl", "implements", "override"),
    "core.identity": ("CacheIdentity",),
    "core.plan": ("Plan",),
    "core.positions.policy": ("ModelPositions", "Positions"),
    "core.run": ("Run", "start"),
    "core.storage": ("ByteSink", "ByteSource"),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'core' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from core.contributions import (
        BATCH as BATCH,
        MODEL as MODEL,
        PIPELINE as PIPELINE,
        CheckpointFormat as CheckpointFormat,
        Converter as Converter,
        Description as Description,
        EngineType as EngineType,
        ModelFamily as ModelFamily,
        ParameterRules as ParameterRules,
        Phase as Phase,
        Probe as Probe,
        Reading as Reading,
        Recipe as Recipe,
        Row as Row,
        Settings as Settings,
        Stage as Stage,
        Step as Step,
        Storage as Storage,
        Transform as Transform,
    )
    from core.discovery import discover as discover
    from core.engines import (
        Completion as Completion,
        Constraint as Constraint,
        Engine as Engine,
        EngineStats as EngineStats,
        Request as Request,
        Sampling as Sampling,
        Token as Token,
        generate as generate,
    )
    from core.errors import (
        CheckpointError as CheckpointError,
        CoreError as CoreError,
        DataError as DataError,
        EngineError as EngineError,
        ModelError as ModelError,
        PlanError as PlanError,
        PluginError as PluginError,
        SettingsError as SettingsError,
    )
    from core.events import (
        CheckpointSaved as CheckpointSaved,
        Event as Event,
        RunEnded as RunEnded,
        RunStarted as RunStarted,
        StepEnded as StepEnded,
    )
    from core.hooks import (
        API as API,
        Hooks as Hooks,
        hookimpl as hookimpl,
        implements as implements,
        override as override,
    )
    from core.identity import CacheIdentity as CacheIdentity
    from core.plan import Plan as Plan
    from core.positions.policy import ModelPositions as ModelPositions, Positions as Positions
    from core.run import Run as Run, start as start
    from core.storage import ByteSink as ByteSink, ByteSource as ByteSource
