"""What the DCP writers of this package share: they stage for themselves, through a :class:`Staging`."""

from __future__ import annotations

import os
from concurrent.futures import Future
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemWriter

from core_fastpersist.dcp.staging import Staged, Staging
from core_fastpersist.direct.carrier import Carrier


class StagingWriter(FileSystemWriter):
    """A DCP writer that also is DCP's ``AsyncStager``.

    Args:
        path: folder of the checkpoint.
        staging: how tensors are staged and files carried; shared by the checkpoints of a run.

    Attributes:
        staged_checkpoint: what :meth:`stage` has made; ``None`` in a plain ``dcp.save``.
    """

    def __init__(self, path: str | os.PathLike[str], staging: Staging | None = None) -> None:
        super().__init__(path)
        self.staging = staging or Staging()
        self.staged_checkpoint: Staged | None = None

    def stage(self, state_dict: dict[str, Any]) -> Any:
        """Stage a state dict as :class:`Staging` says; returns it with copies, or a future of it."""
        self.staged_checkpoint = self.staging.stage(state_dict)
        return self.staged_checkpoint.state

    @property
    def staged(self) -> Future[None] | None:
        """Done when the live tensors that :meth:`stage` handed on were read; ``None`` for copies."""
        return None if self.staged_checkpoint is None else self.staged_checkpoint.live

    @property
    def carrier(self) -> Carrier:
        """What writes this checkpoint's files."""
        return self.staging.carrier(self.staged_checkpoint)

    @property
    def should_synchronize_after_execute(self) -> bool:
        return False

    def synchronize_staging(self) -> None:
        if self.staged_checkpoint is not None and isinstance(self.staged_checkpoint.state, Future):
            self.staged_checkpoint.state.result()

    def release(self) -> None:
        """Let the next checkpoint have the memory of this one."""
        if self.staged_checkpoint is not None:
            self.staged_checkpoint.release()

    def close(self) -> None:
        """Keep what was allocated: the staging serves the next checkpoint, too."""
