"""The engines of a run: which one serves a model, and how it hears of training."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from core.choice import choose
from core.contributions import EngineType
from core.engines import Engine, EngineSettings
from core.errors import CoreError
from core.hooks import Hooks

if TYPE_CHECKING:
    from core.run import Run


class LiveEngines:
    """Builds the engines of one run on live modules, and tells them of changed weights."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._watches: list[weakref.finalize[..., Engine]] = []

    def build(self, model: nn.Module, name: str | None = None) -> Engine:
        """Build the named engine, or the preferred one that serves the model.

        While the run lasts, the engine hears of every step of an optimizer over its parameters.

        Args:
            model: a transformers causal language model.
            name: an engine's name, ``"auto"``, or ``None`` for ``engine.name`` of the settings.

        Raises:
            PluginError: for an unknown name, or when no engine serves the model.
            CoreError: the refusal of a named engine.
        """
        wanted = name or self._run.settings(EngineSettings).name
        attempt = _Attempt(model, self._run, auto=wanted == "auto")
        found = self._run.plugins.collect(Hooks.core_engines)
        choice = choose("engine", wanted, found, attempt.objection)
        self._run.announce(f"engine: {choice.value.name}, {choice.why}")
        engine = attempt.built or choice.value.build(model, self._run)
        self._watches = [watch for watch in self._watches if watch.alive]
        self._watches.append(watch_weights(engine, model))
        return engine

    def close(self) -> None:
        """Tell no engine anything from now on; the engines themselves stay open."""
        for watch in self._watches:
            watch()
        self._watches.clear()


class _Attempt:
    """One model looking for an engine; where any will do, a refusal only rules out that one."""

    def __init__(self, model: nn.Module, run: Run, *, auto: bool) -> None:
        self.model = model
        self.run = run
        self.auto = auto
        self.built: Engine | None = None

    def objection(self, engine_type: EngineType) -> str:
        """Reason against an engine. With ``auto`` it is built, for only that tells for sure."""
        reason = engine_type.works(self.model)
        if reason or not self.auto:
            return reason
        try:
            self.built = engine_type.build(self.model, self.run)
        except CoreError as error:
            return f"{error.what}: {error.why}" if error.why else error.what
        return ""


def watch_weights(engine: Engine, model: nn.Module) -> weakref.finalize[..., Engine]:
    """Call ``engine.weights_changed()`` after every step of an optimizer over its parameters.

    Ends with the engine itself, or by calling the result; a closed engine may still be told.
    Neither engine nor model is kept alive by it.

    Args:
        engine: any engine; an object that takes weak references.
        model: the module that it was built on.

    Example::

        engine = MyEngine(model)
        watch_weights(engine, model)
    """
    told = partial(_stepped, weakref.ref(engine), weakref.ref(model))
    handle = register_optimizer_step_post_hook(told)
    watch = weakref.finalize(engine, handle.remove)
    watch.atexit = False
    return watch


def _stepped(
    engine: Callable[[], Engine | None],
    model: Callable[[], nn.Module | None],
    optimizer: Optimizer,
    *_: Any,
) -> None:
    served, module = engine(), model()
    if served is None or module is None:
        return
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    # Looked up anew: sharding replaces parameters after an engine was built.
    if any(id(parameter) in stepped for parameter in module.parameters()):
        served.weights_changed()
