"""One checkpoint being written: staged in the training thread, written and committed in another."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager, BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future as TorchFuture

from core.checkpoints.save import root_cause
from core.checkpoints.state import Parts
from core.contributions import CheckpointFormat
from core.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from core.run import Run


class Writing:
    """Takes one checkpoint from live tensors to a committed folder.

    A rank that fails says so to all others before any of them writes, so that none waits for it.

    Args:
        format: the chosen format.
        folder: temporary folder that is written.
        run: the run that saves.
        group: what the ranks talk in, from the writing thread.
    """

    def __init__(
        self, format: CheckpointFormat, folder: Path, run: Run, group: ProcessGroup | None
    ) -> None:
        self._format = format
        self._folder = folder
        self._run = run
        self._group = group
        self._writer: StorageWriter | None = None
        self._stager: AsyncStager | None = None
        self._tensors: Future[dict[str, Any]] = Future()
        self._staged: Future[None] = Future()

    def stage(self, parts: Parts) -> Future[None]:
        """Have the tensors copied, or promised to be, and return when they may change again.

        What the stager gets stays as it is until then: core itself copies everything that more
        than an optimizer step changes, such as buffers and the state of data loaders.
        """
        try:
            assert self._format.writer is not None
            self._writer = self._format.writer(self._folder, self._run)
            own = self._writer if isinstance(self._writer, AsyncStager) else None
            self._stager = own or BlockingAsyncStager()
            result = self._stager.stage(_fixed(parts))
        except Exception as error:
            self._tensors.set_exception(error)
            self._staged.set_exception(error)
            return self._staged
        if isinstance(result, Future):
            self._tensors = result
        else:
            self._tensors.set_result(result)
        # A stager that hands on live tensors says by this attribute when it has read them.
        late = getattr(self._stager, "staged", None)
        source = late if isinstance(late, Future) else self._tensors
        source.add_done_callback(lambda done: self._now_staged(done.exception()))
        return self._staged

    def write(self, commit: Callable[[], None]) -> None:
        """Write and commit; runs in a thread of its own, on all ranks.

        Raises:
            CheckpointError: on every rank, when staging has failed on any.
        """
        try:
            self._agree()
            assert self._writer is not None
            tensors = self._tensors.result()
            writer = CommittingWriter(self._writer, commit)
            make_planner = self._format.planner
            planner = make_planner(self._run) if make_planner else DefaultSavePlanner()
            if self._group is None:
                _save_alone(tensors, writer, planner)
            else:
                save(tensors, storage_writer=writer, planner=planner, process_group=self._group)
        finally:
            if self._stager is not None:
                self._stager.close()
            self._now_staged(None)

    def _agree(self) -> None:
        error = self._tensors.exception()
        reasons = ["" if error is None else root_cause(error)]
        if self._group is not None:
            everyone: list[Any] = [None] * self._run.world_size
            dist.all_gather_object(everyone, reasons[0], group=self._group)
            reasons = everyone
        failed = [f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason]
        if failed:
            raise CheckpointError("; ".join(failed))

    def _now_staged(self, error: BaseException | None) -> None:
        if self._staged.done():
            return
        if error is None:
            self._staged.set_result(None)
        else:
            self._staged.set_exception(error)


class CommittingWriter(StorageWriter):
    """Passes everything to a format's writer, and commits when that one has finished.

    ``finish`` runs on the coordinator only, after all ranks have written, and DCP tells all ranks
    how it went: a commit placed there is a commit on every rank.
    """

    def __init__(self, inner: StorageWriter, commit: Callable[[], None]) -> None:
        self.inner = inner
        self._commit = commit

    def reset(self, checkpoint_id: Any = None) -> None:
        self.inner.reset(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.inner.set_up_storage_writer(is_coordinator, *args, **kwargs)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return self.inner.prepare_local_plan(plan)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return self.inner.prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        return self.inner.write_data(plan, planner)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.inner.finish(metadata, results)
        self._commit()

    def storage_meta(self) -> StorageMeta | None:
        return self.inner.storage_meta()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _save_alone(tensors: dict[str, Any], writer: StorageWriter, planner: SavePlanner) -> None:
    """What DCP does for a single process, without what it spends on talking to itself."""
    planner.set_up_planner(tensors, writer.storage_meta(), True)
    writer.set_up_storage_writer(True, rank=0, use_collectives=True)
    local = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([local])
    (plan,) = writer.prepare_global_plan(plans)
    written = writer.write_data(planner.finish_plan(plan), planner)
    writer.finish(metadata, [written.wait()])


def _fixed(parts: Parts) -> dict[str, Tensor]:
    """The tensors, with copies of those that change between two optimizer steps."""
    return {
        name: tensor if name in parts.stable else tensor.detach().clone()
        for name, tensor in parts.tensors.items()
    }
