"""Real DeepSpeed runs on CPU ranks, kept between test runs: checkpoints and what they must hold.

The fixture ``lab`` of conftest.py gives a :class:`Lab`:

- ``lab.saved(case)`` trains ``case.steps`` steps, saves, trains ``case.more`` steps further, and
  returns a :class:`Saved`: ``folder`` (what ``save_checkpoint`` was given), ``tag_folder``,
  ``truth()`` (all tensors at the time of saving, by key), ``final()`` (after the further steps),
  ``facts`` with ``losses``, ``continued``, ``hyper``, ``groups``, ``scheduler``, ``scale``.
- ``lab.resume(case, folder, steps)`` builds the engine of any case, lets DeepSpeed load a folder
  and goes on: a :class:`Resumed` with ``losses``, ``loaded()`` and ``final()`` tensors. Batches go
  by ``global_steps`` and the whole batch is the same for every world size, so its losses belong
  beside ``Saved.facts["continued"]``. ``resume(..., universal=True)`` loads DeepSpeed's universal
  form.
- ``lab.universal(case)`` is the folder that ``ds_to_universal`` makes of a case.

Keys of tensors: ``model.<name>`` at full precision, ``optim.state.<name>.<state>``, and
``half.<name>`` for the weights that compute and for buffers (also those of frozen weights, which
have no ``model.`` key).

Cases are in :mod:`ucp.deepspeed_cases`; add one there, or use ``case.but("name", stage=3)``. What a
run leaves is kept by a hash of its case, these files, and the versions; set
``CORE_UCP_ARTEFACTS`` to say where.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from safetensors.torch import load_file
from torch import Tensor
from ucp.deepspeed_cases import Case

_HERE = Path(__file__).parent
_SOURCES = ("models", "truth", "server")


class RunError(Exception):
    """DeepSpeed did not finish a run; holds its tracebacks."""


@dataclasses.dataclass(frozen=True)
class Saved:
    """A run that has saved a checkpoint."""

    case: Case
    path: Path

    @property
    def folder(self) -> Path:
        """What ``save_checkpoint`` was given: holds ``latest`` and the tag's folder."""
        return self.path / "checkpoint"

    @property
    def tag_folder(self) -> Path:
        """Where the files are."""
        return self.folder / (self.folder / "latest").read_text()

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Losses and whatever is no tensor."""
        return dict(json.loads((self.path / "facts.json").read_text()))

    def truth(self) -> dict[str, Tensor]:
        """All tensors when the checkpoint was saved."""
        return load_file(self.path / "truth.safetensors")

    def final(self) -> dict[str, Tensor]:
        """All tensors after the further steps."""
        return load_file(self.path / "final.safetensors")


@dataclasses.dataclass(frozen=True)
class Resumed:
    """A run that went on from a checkpoint."""

    path: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Losses and whatever is no tensor."""
        return dict(json.loads((self.path / "facts.json").read_text()))

    @property
    def losses(self) -> list[float]:
        """One per step."""
        return list(self.facts["losses"])

    def loaded(self) -> dict[str, Tensor]:
        """All tensors as DeepSpeed has loaded them."""
        return load_file(self.path / "loaded.safetensors")

    def final(self) -> dict[str, Tensor]:
        """All tensors at the end."""
        return load_file(self.path / "truth.safetensors")


class Lab:
    """Runs DeepSpeed, or finds what an earlier run has left.

    Args:
        scratch: a folder for what is not kept.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._server: subprocess.Popen[str] | None = None
        self._log: IO[str] | None = None
        default = Path(tempfile.gettempdir()) / f"core-ucp-artefacts-{os.getuid()}"
        self._kept = Path(os.environ.get("CORE_UCP_ARTEFACTS", default))

    def saved(self, case: Case) -> Saved:
        """A run of a case with its checkpoint; do not write to its folder."""
        path = self._kept / f"{case.name}-{_digest(case)}"
        with _lock(path):
            if not path.exists():
                made = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
                made.mkdir()
                self._fork(case, made, steps=case.steps, more=case.more, save=True)
                made.rename(path)
        return Saved(case, path)

    def universal(self, case: Case) -> Path:
        """What DeepSpeed's own converter makes of a case; a tag's folder.

        Raises:
            RunError: with its traceback, when it fails.
        """
        saved = self.saved(case)
        path = saved.path / "universal" / saved.tag_folder.name
        failure = saved.path / "universal.failed"
        with _lock(saved.path / "universal.lock"):
            if not path.exists() and not failure.exists():
                made = saved.path / f"new-{uuid.uuid4().hex[:8]}"
                target = made / path.name
                target.mkdir(parents=True)
                try:
                    self._ask(kind="universal", load=str(saved.tag_folder), out=str(target))
                except RunError as error:
                    failure.write_text(str(error))
                else:
                    made.rename(path.parent)
            if failure.exists():
                raise RunError(failure.read_text())
        return path

    def resume(
        self,
        case: Case,
        folder: Path,
        steps: int = 3,
        *,
        tag: str | None = None,
        universal: bool = False,
        save: bool = False,
    ) -> Resumed:
        """Let the engine of a case load a folder with DeepSpeed's own loader, and go on.

        Args:
            case: of the run that goes on; need not be the one that has saved.
            folder: holds ``latest`` and the tag's folder.
            steps: to train.
            tag: to load; that of ``latest`` unless given.
            universal: whether the folder holds DeepSpeed's universal form.
            save: whether to save a checkpoint at the end, in ``path / "checkpoint"``.

        Raises:
            RunError: with the tracebacks of the ranks.
        """
        out = self._scratch / f"{case.name}-{uuid.uuid4().hex[:8]}"
        out.mkdir()
        if universal:
            case = dataclasses.replace(
                case, settings=case.settings | {"checkpoint": {"load_universal": True}}
            )
        self._fork(case, out, load=folder, tag=tag, steps=steps, save=save)
        return Resumed(out)

    def close(self) -> None:
        """End the process that forks."""
        if self._server is not None and self._server.stdin is not None:
            self._server.stdin.close()
            self._server.wait()
        if self._log is not None:
            self._log.close()

    def _fork(
        self,
        case: Case,
        out: Path,
        *,
        load: Path | None = None,
        tag: str | None = None,
        steps: int,
        more: int = 0,
        save: bool,
    ) -> None:
        self._ask(
            kind="run",
            case=dataclasses.asdict(case),
            out=str(out),
            load=str(load) if load else None,
            tag=tag,
            steps=steps,
            more=more,
            save=save,
        )

    def _ask(self, **job: Any) -> None:
        if self._server is None:
            self._start()
        assert self._server is not None
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline() or '{"error": "the server is gone"}')
        if answer["error"]:
            raise RunError(answer["error"])

    def _start(self) -> None:
        self._log = (self._scratch / "deepspeed.log").open("w")
        self._server = subprocess.Popen(
            [sys.executable, str(_HERE / "deepspeed_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self._server.stdout is not None
        if not self._server.stdout.readline():
            raise RunError((self._scratch / "deepspeed.log").read_text()[-5000:])


def copy(folder: Path, target: Path) -> Path:
    """A copy of a checkpoint that a test may damage."""
    return Path(shutil.copytree(folder, target))


def _digest(case: Case) -> str:
    described = dataclasses.asdict(case) | {
        package: importlib.metadata.version(package)
        for package in ("deepspeed", "torch", "transformers")
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for source in _SOURCES:
        digest.update((_HERE / f"deepspeed_{source}.py").read_bytes())
    return digest.hexdigest()[:12]


@contextmanager
def _lock(path: Path) -> Generator[None]:
    """One test process at a time makes an artefact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
