"""Saving without losing anything: staged copies, background writing, commit as the last act."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from core.errors import CheckpointError


class Save:
    """A checkpoint on its way to the disk.

    ``staged`` means that training may change the saved tensors again; core waits for it before the
    next ``optimizer.step()`` of the process by itself, also in a loop that is not core's.
    ``durable`` means that the checkpoint is complete, synced and visible.

    Example::

        save = run.save({"model": model, "optimizer": optimizer}, step)
        ...                       # forward and backward of the next step overlap the writing
        optimizer.step()          # waits until staged; raises here if the save failed
        save.durable()            # waits until the folder is there; returns its path
    """

    def __init__(
        self,
        step: int,
        path: Path,
        temporary: Path,
        staged: Future[None],
        written: Future[Any],
    ) -> None:
        self.step = step
        self.path = path
        self.reported = False
        self._temporary = temporary
        self._staged = staged
        self._written = written

    def staged(self, timeout: float | None = None) -> None:
        """Wait until the saved tensors may change again.

        Args:
            timeout: seconds to wait at most.

        Raises:
            CheckpointError: when the save has failed, or does not get there in time.
        """
        self._wait(self._staged, timeout)
        if self._written.done():
            self._wait(self._written, 0)

    def durable(self, timeout: float | None = None) -> Path:
        """Wait until the checkpoint is complete on disk, and return its folder.

        Raises:
            CheckpointError: when the save has failed, or does not get there in time.
        """
        end = None if timeout is None else time.monotonic() + timeout
        self._wait(self._staged, timeout)
        self._wait(self._written, None if end is None else max(0.0, end - time.monotonic()))
        return self.path

    @property
    def done(self) -> bool:
        """Whether the save has ended, well or badly."""
        return self._written.done()

    def _wait(self, future: Future[Any], timeout: float | None) -> None:
        try:
            future.result(timeout)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if isinstance(error, FutureTimeout) and not future.done():
                late = f"the checkpoint of step {self.step} is not done after {timeout} seconds"
                raise CheckpointError(late) from None
            shutil.rmtree(self._temporary, ignore_errors=True)
            self.reported = True
            raise CheckpointError(
                f"the checkpoint of step {self.step} failed",
                why=root_cause(error),
                fix=f"nothing is lost: older checkpoints in {self.path.parent} are intact",
            ) from error


class StepGuard:
    """Waits for a pending save right before any optimizer of the process steps."""

    def __init__(self, on_durable: Callable[[Save], None]) -> None:
        self._on_durable = on_durable
        self._pending: Save | None = None
        self._handle: RemovableHandle | None = None

    def watch(self, save: Save) -> None:
        """Wait for ``save`` to be staged before the next step."""
        self._pending = save
        if self._handle is None:
            self._handle = register_optimizer_step_pre_hook(self._before_step)

    def wait(self) -> None:
        """Wait for the pending save to be durable, and report it.

        Raises:
            CheckpointError: when it failed, unless its own methods have raised that before.
        """
        save, self._pending = self._pending, None
        if save is not None and not save.reported:
            save.durable()
            self._on_durable(save)

    def release(self) -> None:
        """Stop watching."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _before_step(self, optimizer: object, args: object, kwargs: object) -> None:
        if self._pending is None:
            return
        if self._pending.done:
            self.wait()
        else:
            self._pending.staged()


def root_cause(error: BaseException) -> str:
    """The innermost reason: DCP wraps the failures of ranks into one exception."""
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        rank, wrapped = next(iter(failures.items()))
        inner = wrapped[0] if isinstance(wrapped, tuple) else wrapped
        return f"rank {rank}: {root_cause(inner)}"
    if isinstance(error, CheckpointError):
        return f"{error.what}: {error.why}" if error.why else error.what
    return f"{type(error).__name__}: {error}"
