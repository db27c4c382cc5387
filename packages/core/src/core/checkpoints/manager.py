"""The checkpoints of one run: submitted, waited for, found again and loaded."""

from __future__ import annotations

import logging
import os
import uuid
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.checkpoints import layout, rng
from core.checkpoints.foreign import Translation, renamed, translate
from core.checkpoints.layout import Manifest
from core.checkpoints.outline import Outlines
from core.checkpoints.reading import introduce, open_reader, read
from core.checkpoints.save import Save, StepGuard
from core.checkpoints.settings import CheckpointSettings
from core.checkpoints.state import Parts, State, loaded_values, restore, room, split
from core.checkpoints.writing import Writing
from core.choice import Choice, choose
from core.contributions import CheckpointFormat, Storage
from core.disk import TEMPORARY, nearest_existing
from core.errors import CheckpointError
from core.events import CheckpointSaved
from core.hooks import Hooks
from core.plugins import Contributed
from core.storage import publish

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.distributed.checkpoint.storage import StorageReader

    from core.run import Run

logger = logging.getLogger("core")
# DCP warns about every save of a single process, which is a normal case here.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


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


@dataclass(frozen=True)
class _Opened:
    """A checkpoint that fits a state, before anything is read."""

    folder: Path
    manifest: layout.Manifest
    reader: StorageReader
    names: Translation
    tensors: dict[str, Tensor]
    remarks: list[str]


class Checkpoints:
    """Saves and loads the checkpoints of one run.

    Args:
        run: gives settings, plugins, ranks and plan.
        directory: where they are; by default as the settings say, or in the run's folder.
        format: what new ones are written in; by default as the settings say.
    """

    def __init__(self, run: Run, directory: Path | None = None, format: str | None = None) -> None:
        self.run = run
        self.settings = run.settings(CheckpointSettings)
        self._wanted = format or self.settings.format
        named = self.settings.directory or run.folder / "checkpoints"
        self.directory = directory or Path(named)
        self._guard = StepGuard(self._announce)
        self._lock: layout.Lock | None = None
        self._format: Choice[CheckpointFormat] | None = None
        self._went_back_to: int | None = None
        self._closed = False
        self._storages: dict[int, Choice[Storage]] = {}
        self._outlines = Outlines()
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="core-checkpoint")

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
        """The format new checkpoints are written in, and why; all ranks ask together at first."""
        if self._format is None:
            existing = nearest_existing(self.directory)

            def objection(candidate: CheckpointFormat) -> str:
                if not candidate.writer:
                    return "it cannot be written"
                return self._anybody(candidate.works(existing))

            chosen = choose("checkpoint format", self._wanted, self.formats(), objection)
            self.run.announce(f"checkpoints: {chosen.value.name}, {chosen.why}")
            self._format = chosen
        return self._format

    def storage(self, path: Path | None = None) -> Choice[Storage]:
        """The storage that carries bytes on the disk of ``path``, and why.

        Args:
            path: what will be read or written; by default the directory of the checkpoints.
        """
        existing = nearest_existing(path or self.directory)
        disk = existing.stat().st_dev
        if disk not in self._storages:
            found = [
                Contributed(c.plugin, c.value)
                for c in self.run.plugins.collect(Hooks.core_checkpoints)
                if isinstance(c.value, Storage)
            ]
            chosen = choose("storage", self.settings.storage, found, lambda s: s.works(existing))
            self.run.announce(f"storage for {existing}: {chosen.value.name}, {chosen.why}")
            self._storages[disk] = chosen
        return self._storages[disk]

    def _anybody(self, reason: str) -> str:
        """The first rank's objection, so that all ranks choose alike."""
        reasons = self.run.ranks.gather(reason)
        return next((f"rank {rank}: {text}" for rank, text in enumerate(reasons) if text), "")

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
        if rng.NAME in state:
            raise CheckpointError(f"the name {rng.NAME!r} is core's", fix="rename the entry")
        if step < 0:
            raise CheckpointError(f"step {step} is negative", fix="count optimizer steps done")
        self._refuse_closed()
        self.wait()
        parts = self.run.ranks.agree(lambda: split(state, self._outlines))
        parts.tensors |= rng.named(self.run.rank)
        final = layout.step_folder(self.directory, step)
        temporary = self._prepare(final)
        save = self._submit(parts, step, temporary, final)
        self._guard.watch(save)
        return save

    def _refuse_closed(self) -> None:
        if self._closed:
            raise CheckpointError("the run is closed", fix="save and load before run.close()")

    def own(self) -> None:
        """Take the directory for this run, and clean up behind an interrupted one (rank 0).

        Raises:
            CheckpointError: when another job saves into it.
        """
        if self._lock is None:
            self._lock = layout.Lock(self.directory)
            layout.remove_leftovers(self.directory)

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
            path: a checkpoint folder, or ``None`` for the newest valid one of this run. What
                another program wrote can be loaded too, if a format reads it and the names fit.

        Raises:
            CheckpointError: when there is none, or it is damaged, or lacks what ``state`` needs.
        """
        self._refuse_closed()
        self.wait()
        found = self.run.ranks.agree(lambda: self._open(state, path))
        folder, manifest, tensors, remarks = (
            found.folder,
            found.manifest,
            found.tensors,
            found.remarks,
        )
        generators = rng.room(self.run.rank, found.names.saved)
        read(folder, found.reader, renamed(tensors | generators, found.names), self._group)
        restore(state, tensors, found.names.values)
        if manifest.world_size:
            rng.bring_back(self.run.rank, manifest.step, generators)
        if manifest.world_size not in (0, self.run.world_size):
            remarks.append(_ranks_remark(manifest.world_size, self.run.world_size))
        remarks += manifest.differences(self.run.describe())
        for remark in remarks if self.run.is_main else ():
            logger.warning("%s", remark)
        if path is None:
            self._went_back_to = manifest.step
        values = loaded_values(state, tensors, found.names.values)
        return Loaded(manifest.step, folder, values, tuple(remarks))

    def _open(self, state: State, path: str | os.PathLike[str] | None) -> _Opened:
        """Find a checkpoint and make sure that ``state`` fits it; nothing is changed yet."""
        if path is None:
            folder, manifest, skipped = layout.newest_valid(self.directory)
            translated = False
        else:
            folder, skipped = Path(path), []
            found = introduce(folder, self.run)
            manifest, translated = found.manifest, found.translated
        reader = open_reader(folder, manifest, self.run)
        remarks = [f"skipped {reason}" for reason in skipped]
        try:
            saved = set(reader.read_metadata().state_dict_metadata)
            names = Translation(saved, manifest.values)
            if translated:
                names = translate(state, saved, manifest.values)
                remarks += names.remarks()
            tensors = room(state, names.saved, names.values)
        except CheckpointError as error:
            raise CheckpointError(f"cannot load {folder}", why=error.what) from None
        return _Opened(folder, manifest, reader, names, tensors, remarks)

    def close(self) -> None:
        """Wait for the last checkpoint and give the directory up.

        Raises:
            CheckpointError: when the last checkpoint failed.
        """
        self._closed = True
        try:
            self.wait()
        finally:
            self._writing.shutdown()
            self._guard.release()
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def _prepare(self, final: Path) -> Path:
        """Own the directory, and agree with all ranks on a temporary folder."""
        problem = ""
        temporary = final.with_name(f"{final.name}{TEMPORARY}{uuid.uuid4().hex[:8]}")
        if self.run.is_main:
            try:
                self.own()
                if self._went_back_to is not None:
                    for path in layout.set_aside(self.directory, self._went_back_to):
                        logger.warning("a later checkpoint is set aside: %s", path)
                if final.exists():
                    raise CheckpointError(f"{final} exists already")
                temporary.mkdir()
            except (CheckpointError, OSError) as error:
                problem = str(error)
        self._went_back_to = None
        agreed: tuple[Path, str] = self.run.ranks.gather((temporary, problem))[0]
        temporary, problem = agreed
        if problem:
            raise CheckpointError(problem)
        return temporary

    def _submit(self, parts: Parts, step: int, temporary: Path, final: Path) -> Save:
        chosen = self.format().value
        run = {**self.run.describe(), "settings": self.run.settings_tree()}

        def commit() -> None:
            sizes = layout.file_sizes(temporary)
            world = self.run.world_size
            Manifest(step, chosen.name, world, parts.values, run, sizes).write(temporary)
            publish(temporary, final)
            layout.prune(self.directory, self.settings.keep)

        writing = Writing(chosen, temporary, self.run, self._group)
        staged = writing.stage(parts)
        return Save(step, final, temporary, staged, self._writing.submit(writing.write, commit))

    def _announce(self, save: Save) -> None:
        self.run.emit(CheckpointSaved(step=save.step, path=save.path))


def _ranks_remark(saved: int, now: int) -> str:
    return (
        f"saved by {saved} ranks, loaded by {now}: random numbers of ranks without a saved state "
        "start from (step, rank)"
    )
