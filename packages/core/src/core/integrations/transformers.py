"""Checkpoints and events of core inside the ``Trainer`` of transformers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from core.events import StepEnded
from core.run import Run


class CoreCallback(TrainerCallback):
    """Gives an existing ``Trainer`` script the run's checkpoints and the plugins' events.

    Apply the transforms before the trainer is built, and add the callback to it::

        run = core.start("run.toml")
        trainer = Trainer(model=run.apply(core.MODEL, model), args=args, train_dataset=data,
                          callbacks=[CoreCallback(run, save_every=100)])
        trainer.train()

    Args:
        run: the run.
        save_every: optimizer steps between checkpoints; 0 saves at the end only.
        resume: load the newest checkpoint of the run before the first step, and count on from
            there. Weights, optimizer, schedule and random numbers go on exactly; the trainer's
            data loader starts anew, as it does not expose its position to callbacks.
    """

    def __init__(self, run: Run, *, save_every: int = 0, resume: bool = False) -> None:
        self.run = run
        self.save_every = save_every
        self.resume = resume
        self._state: dict[str, Any] = {}
        self._saved = -1
        self._ended: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        names = {"model": "model", "optimizer": "optimizer", "scheduler": "lr_scheduler"}
        self._state = {name: _unwrap(kwargs[key]) for name, key in names.items()}
        if self.resume:
            state.global_step = self._saved = self.run.load(self._state).step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tell({})
        self._ended = state.global_step
        if self.save_every and state.global_step % self.save_every == 0:
            self._save(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._tell({k: float(v) for k, v in (logs or {}).items() if isinstance(v, int | float)})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tell({})
        if self._saved != state.global_step:
            self._save(state.global_step)
        self.run.checkpoints.wait()

    def _tell(self, metrics: dict[str, float]) -> None:
        """Emit the step that has ended; the trainer logs its figures only after that."""
        if self._ended is not None:
            self.run.emit(StepEnded(step=self._ended, metrics=metrics))
            self._ended = None

    def _save(self, step: int) -> None:
        self.run.save(self._state, step)
        self._saved = step


def _unwrap(part: Any) -> Any:
    """The torch object inside accelerate's wrapper."""
    for name in ("optimizer", "scheduler"):
        part = getattr(part, name, part)
    return part
