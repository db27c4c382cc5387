"""Folders of accelerate's ``save_state``, and those of the trainer of transformers.

Weights lie in safetensors, in ``pytorch_model.bin``, or in a DCP folder under FSDP; the optimizer
in ``optimizer.bin``, ``optimizer.pt``, or a DCP folder of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import CheckpointError
from core_ucp.files.distcp import Objects, read_stored
from core_ucp.files.metadata import METADATA
from core_ucp.files.texts import read_json
from core_ucp.files.trees import Leaves, walk
from core_ucp.sources.full import INDEX, WEIGHTS, bin_files, read_leaves
from core_ucp.sources.huggingface import open_tensors
from core_ucp.sources.relations import tied
from core_ucp.sources.sections import arrange
from core_ucp.view.files import Files
from core_ucp.view.view import View

if TYPE_CHECKING:
    from core_ucp.layout.rules import Rules

_MODEL_FOLDER, _OPTIMIZER_FOLDER = "pytorch_model_fsdp_0", "optimizer_0"
_OPTIMIZERS = ("optimizer.bin", "optimizer.pt")
_MARKS = (
    *_OPTIMIZERS,
    f"{_MODEL_FOLDER}/{METADATA}",
    f"{_OPTIMIZER_FOLDER}/{METADATA}",
    "random_states_0.pkl",
)
_STATES = {
    "scheduler.bin": "scheduler",
    "scheduler.pt": "scheduler",
    "scaler.pt": "scaler",
}
_SKIPPED = re.compile(
    r"(random_states_\d+\.pkl|rng_state.*\.pth|sampler.*\.bin|dl_state_dict.*\.bin)"
)
_SECOND = re.compile(r"(model_\d+\.safetensors|optimizer_[1-9]\d*(\.bin)?|pytorch_model_\d+\.bin)")
_CUSTOM = re.compile(r"custom_checkpoint_\d+\.pkl")


def detect(path: Path) -> bool:
    """Whether a folder was written by accelerate or by the trainer of transformers."""
    return path.is_dir() and any((path / mark).is_file() for mark in _MARKS)


def open_view(path: Path, rules: Rules | None = None) -> View:
    """Open a folder of ``save_state``.

    States of random number generators and of samplers belong to processes, and are not carried
    over. An optimizer that numbers its parameters is understood beside ``pytorch_model.bin``, which
    keeps the order of the model; safetensors does not.

    Args:
        path: the folder.
        rules: not needed.

    Raises:
        CheckpointError: for a missing, damaged or hostile file, and for several models.
    """
    found = _Folder(path, Files(path))
    ordered = found.weights()
    found.optimizer()
    found.others()
    arranged = arrange(found.files, found.leaves, ordered=ordered)
    atoms, aliases = tied(arranged.atoms)
    view = View(
        path=path,
        framework="accelerate",
        files=found.files,
        atoms=atoms,
        aliases=aliases,
        resume=arranged.resume,
        details={"files": len(found.files)},
        remarks=(*found.remarks, *arranged.remarks),
    )
    view.prove()
    return view


@dataclass
class _Folder:
    """What is found in a folder, file by file."""

    path: Path
    files: Files
    leaves: Leaves = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def weights(self) -> bool:
        """Find the weights; return whether they come in the order of the model."""
        names = sorted(entry.name for entry in self.path.iterdir())
        second = next((name for name in names if _SECOND.fullmatch(name)), None)
        if second:
            raise CheckpointError(
                f"{self.path} holds several models or optimizers",
                why=second,
                fix="convert the files of each one alone",
            )
        if (self.path / _MODEL_FOLDER / METADATA).is_file():
            self._stored(_MODEL_FOLDER)
            return True
        if any(self.path.glob("*.safetensors")):
            tensors, remarks = open_tensors(self.path, self.files)
            self.leaves |= {("model", name): atom for name, atom in tensors.atoms.items()}
            self.remarks += remarks
            return False
        whole = self.path / "pytorch_model_fsdp.bin"
        if whole.is_file():
            self._archive(whole.name, "model")
        elif (self.path / WEIGHTS).is_file() or (self.path / INDEX).is_file():
            for name in bin_files(self.path):
                self._archive(name, "model")
            return not (self.path / INDEX).is_file()
        else:
            self.remarks.append("there are no weights in the folder")
        return True

    def optimizer(self) -> None:
        """Find the optimizer."""
        if (self.path / _OPTIMIZER_FOLDER / METADATA).is_file():
            self._stored(_OPTIMIZER_FOLDER)
        for name in _OPTIMIZERS:
            if (self.path / name).is_file():
                self._archive(name, "optimizer")

    def others(self) -> None:
        """Find what is of neither."""
        for name, section in _STATES.items():
            if (self.path / name).is_file():
                self._archive(name, section)
        trainer = self.path / "trainer_state.json"
        if trainer.is_file():
            self._trainer(trainer)
        names = sorted(entry.name for entry in self.path.iterdir())
        for name in filter(_CUSTOM.fullmatch, names):
            try:
                self._archive(name, name.removesuffix(".pkl"))
            except CheckpointError as error:
                self.remarks.append(f"{name} is left out: {error.what}")
        skipped = [name for name in names if _SKIPPED.fullmatch(name)]
        if skipped:
            words = ", ".join(skipped)
            self.remarks.append(f"{words}: states of processes, which are not carried over")

    def _archive(self, name: str, section: str) -> None:
        leaves, remarks = read_leaves(self.files, name, (section,))
        self.leaves |= leaves
        self.remarks += remarks

    def _stored(self, name: str) -> None:
        """Take what a DCP folder inside of this one holds."""
        stored = read_stored(self.path / name, self.files)
        objects = Objects(self.files)
        for key, atom in stored.tensors.items():
            self.leaves[stored.paths.get(key, (key,))] = atom
        for key, blob in stored.objects.items():
            self.leaves |= walk(objects.read(key, blob), stored.paths.get(key, (key,)))

    def _trainer(self, path: Path) -> None:
        found: Any = read_json(path)
        if isinstance(found, Mapping):
            self.leaves[("trainer_state",)] = found
            if isinstance(found.get("global_step"), int):
                self.leaves[("global_step",)] = found["global_step"]
