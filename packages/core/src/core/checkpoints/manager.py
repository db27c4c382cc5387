"""The checkpoints of one run: submitted, waited for, found again and loaded."""

from __future__ import annotations

import logging
import os
import uuid
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save

from core.checkpoints import layout, rng
from core.checkpoints.layout import Manifest
from core.checkpoints.planner import SafeLoadPlanner
from core.checkpoints.save import CommittingWriter, Save, StepGuard, root_cause
from core.checkpoints.settings import CheckpointSettings
from core.checkpoints.state import State, loaded_values, restore, split
from core.choice import Choice, choose
from core.contributions import CheckpointFormat, Storage
from core.errors import CheckpointError
from core.events import CheckpointSaved
from core.hooks import Hooks
from core.plugins import Contributed
from core.storage import TEMPORARY, publish

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from core.run import Run

logger = logging.getLogger("core")
# DCP warns about every save of a single process, which is a normal case here.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
_RNG = "rng"


@dataclass(frozen=True)
class Loaded:
    """What was loaded.

    Attributes:
        step: optimizer steps done when it was saved.
        path: the checkpoint's folder.
        values: plain values of the state (numbers, strings) by name.
        remarks: what the user should see: skipped checkpoints, a changed plan, re-seeded ranks.
    """

    step: int
    path: Path
    values: Mapping[str, Any]
    remarks: tuple[str, ...] = ()


class Checkpoints:
    """Saves and loads the checkpoints of one run.

    Args:
        run: gives settings, plugins, ranks and plan.
        directory: where they are; by default as the settings say, or in the run's folder.
    """

    def __init__(self, run: Run, directory: Path | None = None) -> None:
        self.run = run
        self.settings = run.settings(CheckpointSettings)
        named = self.settings.directory or run.folder / "checkpoints"
        self.directory = directory or Path(named)
        self._guard = StepGuard(self._announce)
        self._lock: layout.Lock | None = None
        self._format: Choice[CheckpointFormat] | None = None

    @cached_property
    def _group(self) -> ProcessGroup | None:
        """Ranks talk about a save in the background, so not in the group of the main thread."""
        return self.run.ranks.new_cpu_group()

    def formats(self) -> list[Contributed[CheckpointFormat]]:
        """The formats of all plugins."""
        return [
            Contributed(c.plugin, c.value)
            for c in self.run.plugins.collect(Hooks.core_checkpoints)
            if isinstance(c.value, CheckpointFormat)
        ]

    def format(self) -> Choice[CheckpointFormat]:
        """The format new checkpoints are written in, and why."""
        if self._format is None:

            def objection(candidate: CheckpointFormat) -> str:
                return "it cannot be written" if not candidate.writer else candidate.works(existing)

            existing = _nearest_existing(self.directory)
            chosen = choose("checkpoint format", self.settings.format, self.formats(), objection)
            self.run.announce(f"checkpoints: {chosen.value.name}, {chosen.why}")
            self._format = chosen
        return self._format

    def storage(self) -> Choice[Storage]:
        """The storage that carries bytes of converters and of formats that ask for it, and why."""
        found = [
            Contributed(c.plugin, c.value)
            for c in self.run.plugins.collect(Hooks.core_checkpoints)
            if isinstance(c.value, Storage)
        ]
        existing = _nearest_existing(self.directory)
        return choose("storage", self.settings.storage, found, lambda s: s.works(existing))

    def save(self, state: State, step: int) -> Save:
        """Submit a checkpoint and return at once; all ranks call it together.

        Waits for the checkpoint before it, if that is still being written. The random number
        generators of all ranks are saved with the state.

        Args:
            state: modules, optimizers, objects with ``state_dict()``, tensors and plain values.
            step: optimizer steps done.

        Raises:
            CheckpointError: for a state that cannot be saved, a directory that is in use or has
                this step already, or when the checkpoint before this one failed.
        """
        if _RNG in state:
            raise CheckpointError(f"the name {_RNG!r} is taken by core", fix="rename the entry")
        self.wait()
        tensors, values = split(state)
        for key, tensor in rng.capture().items():
            tensors[f"{_RNG}.{self.run.rank}.{key}"] = tensor
        final = layout.step_folder(self.directory, step)
        temporary = self._prepare(final)
        save = self._submit(tensors, values, step, temporary, final)
        self._guard.watch(save)
        return save

    def wait(self) -> None:
        """Wait until the last submitted checkpoint is durable.

        Raises:
            CheckpointError: when it failed.
        """
        self._guard.wait()

    def load(self, state: State, path: str | os.PathLike[str] | None = None) -> Loaded:
        """Load a checkpoint into the live objects of ``state``; all ranks call it together.

        Args:
            state: the objects to fill; it may be a part of what was saved. Optimizers come with
                their model. Any number of ranks can load what any other number saved.
            path: a checkpoint folder, or ``None`` for the newest valid one of this run.

        Raises:
            CheckpointError: when there is none, or it is damaged, or lacks what ``state`` needs.
        """
        self.wait()
        remarks: list[str] = []
        if path is None:
            folder, manifest, skipped = layout.newest_valid(self.directory)
            remarks += [f"skipped {reason}" for reason in skipped]
        else:
            folder = Path(path)
            manifest = Manifest.read(folder)
        tensors, _ = split(state)
        generators = self._generators_to_load(manifest)
        self._read(folder, manifest, tensors | generators)
        restore(state, tensors, manifest.values)
        remarks += self._restore_generators(manifest, generators)
        remarks += manifest.differences(self.run.describe())
        for remark in remarks if self.run.is_main else ():
            logger.warning("%s", remark)
        return Loaded(manifest.step, folder, loaded_values(state, manifest.values), tuple(remarks))

    def close(self) -> None:
        """Wait for the last checkpoint and give the directory up.

        Raises:
            CheckpointError: when the last checkpoint failed.
        """
        try:
            self.wait()
        finally:
            self._guard.release()
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def _prepare(self, final: Path) -> Path:
        """Own the directory, and agree with all ranks on a temporary folder."""
        problem = ""
        if self.run.is_main:
            try:
                if self._lock is None:
                    self._lock = layout.Lock(self.directory)
                    layout.remove_leftovers(self.directory)
                if final.exists():
                    raise CheckpointError(f"{final} exists already")
            except CheckpointError as error:
                problem = str(error)
        token, problem = self.run.ranks.gather((uuid.uuid4().hex[:8], problem))[0]
        if problem:
            raise CheckpointError(problem)
        return final.with_name(f"{final.name}{TEMPORARY}{token}")

    def _submit(
        self,
        tensors: dict[str, Tensor],
        values: dict[str, Any],
        step: int,
        temporary: Path,
        final: Path,
    ) -> Save:
        chosen = self.format().value
        assert chosen.writer is not None
        run = {**self.run.describe(), "settings": self.run.settings_tree()}

        def commit() -> None:
            sizes = layout.file_sizes(temporary)
            manifest = Manifest(step, chosen.name, self.run.world_size, values, run, sizes)
            manifest.write(temporary)
            publish(temporary, final)
            layout.prune(self.directory, self.settings.keep)

        inner = chosen.writer(temporary, self.run)
        response = async_save(
            tensors,
            storage_writer=CommittingWriter(inner, commit),
            planner=chosen.planner(self.run) if chosen.planner else None,
            async_stager=inner if isinstance(inner, AsyncStager) else None,
            process_group=self._group,
            no_dist=self.run.world_size == 1,
        )
        if isinstance(response, AsyncSaveResponse):
            staged, written = response.staging_completion, response.upload_completion
            return Save(step, final, temporary, staged, written)
        at_once: Future[None] = Future()
        at_once.set_result(None)
        return Save(step, final, temporary, at_once, response)

    def _read(self, folder: Path, manifest: Manifest, tensors: dict[str, Tensor]) -> None:
        chosen = choose(
            "checkpoint format",
            manifest.format,
            self.formats(),
            lambda f: "" if f.reader else "it cannot be read",
        ).value
        assert chosen.reader is not None
        reader = chosen.reader(folder, self.run)
        reader.read_metadata()  # refuses what is damaged or hostile before DCP logs tracebacks
        try:
            load(
                tensors,
                storage_reader=reader,
                planner=SafeLoadPlanner(),
                process_group=self._group,
                no_dist=self.run.world_size == 1,
            )
        except CheckpointException as error:
            raise CheckpointError(f"cannot load {folder}", why=root_cause(error)) from error

    def _generators_to_load(self, manifest: Manifest) -> dict[str, Tensor]:
        if self.run.rank >= manifest.world_size:
            return {}
        return {f"{_RNG}.{self.run.rank}.{k}": t for k, t in rng.capture().items()}

    def _restore_generators(
        self, manifest: Manifest, loaded: Mapping[str, Tensor]
    ) -> tuple[str, ...]:
        if loaded:
            prefix = f"{_RNG}.{self.run.rank}."
            rng.restore({key.removeprefix(prefix): t for key, t in loaded.items()})
        else:
            rng.derive(0, manifest.step, self.run.rank)
        if manifest.world_size == self.run.world_size:
            return ()
        return (
            f"saved by {manifest.world_size} ranks, loaded by {self.run.world_size}: "
            "random numbers of ranks without a saved state start from (step, rank)",
        )

    def _announce(self, save: Save) -> None:
        self.run.emit(CheckpointSaved(step=save.step, path=save.path))


def _nearest_existing(path: Path) -> Path:
    return next(folder for folder in [path, *path.absolute().parents] if folder.exists())
