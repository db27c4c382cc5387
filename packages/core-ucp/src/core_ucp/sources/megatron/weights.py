"""Weights and states of Megatron as atoms: masters before their copies, and no padding."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.errors import CheckpointError
from core_ucp.execution.gathering import item_type, read_box
from core_ucp.sources.megatron.common import Common
from core_ucp.sources.relations import relation
from core_ucp.view.boxes import Boxes, overlaps
from core_ucp.view.files import Files
from core_ucp.view.keys import extra_key, state_key, weight_key
from core_ucp.view.pieces import Pieces
from core_ucp.view.view import Atom, View

MASTERS = ("fp32_param", "param", "master_param")
"""Names of the weights in full precision among the states of an optimizer."""
_VOCABULARY = re.compile(r"(?:.*\.)?(?:word_embeddings|output_layer)\.(?:weight|bias)")
_STACKED = re.compile(r"(?:.*\.)?layers\.(?!\d+\.)")
_LARGEST_PADDING = 64 * 2**20


class Weights:
    """Collects what a checkpoint holds, tensor by tensor.

    Args:
        files: that atoms refer to.
        common: what is known beside the tensors.
    """

    def __init__(self, files: Files, common: Common) -> None:
        self.remarks: list[str] = []
        self._files, self._common = files, common
        self._weights: dict[str, Atom] = {}
        self._states: dict[tuple[str, str], Atom] = {}
        self._extras: dict[str, Atom] = {}

    def weight(self, name: str, atom: Atom) -> None:
        """Add a weight or a buffer of the model."""
        self._weights[name] = self._trimmed(name, "", atom)

    def state(self, name: str, state: str, atom: Atom) -> None:
        """Add a state of the optimizer.

        Raises:
            CheckpointError: when it is there already, from another optimizer.
        """
        if (name, state) in self._states:
            raise CheckpointError(f"two optimizers have {state} of {name}")
        self._states[name, state] = self._trimmed(name, state, atom)

    def extra(self, key: str, atom: Atom) -> None:
        """Add a tensor that belongs to no parameter."""
        self._extras[extra_key(key)] = atom

    def view(
        self, path: Path, details: dict[str, Any], aliases: dict[str, str] | None = None
    ) -> View:
        """Everything together.

        Raises:
            CheckpointError: for elements that no file holds.
        """
        atoms = {weight_key(name): atom for name, atom in self._weights.items()}
        twins: dict[str, Atom] = {}
        for (name, state), atom in self._states.items():
            if state not in MASTERS:
                related = dataclasses.replace(
                    atom, relation=relation(atom, self._weights.get(name))
                )
                atoms[state_key(name, state)] = related
                continue
            key = weight_key(name)
            if key in atoms and atoms[key].dtype != atom.dtype:
                twins[key] = atoms[key]
            atoms[key] = atom
        atoms |= self._steps()
        stepped = {name: self._dims(name, atom) for (name, _), atom in self._states.items()}
        resume, remarks = self._common.resume(self._files, stepped)
        view = View(
            path=path,
            framework="megatron",
            files=self._files,
            atoms={**atoms, **self._extras},
            aliases=aliases or {},
            twins=twins,
            resume=resume,
            mesh=self._common.mesh,
            details=details,
            remarks=(*self.remarks, *remarks),
        )
        view.prove()
        return view

    def _steps(self) -> dict[str, Atom]:
        """The step of every parameter, of which Megatron keeps one for all."""
        step = self._common.step(self._files)
        if step is None:
            return {}
        index = self._files.add_bytes("step of the optimizer", np.float32(step).tobytes())
        atom = Atom((), torch.float32, Pieces.dense((), index, 0, 4), "scalar")
        names = {name for name, state in self._states if state not in MASTERS}
        return {state_key(name, "step"): atom for name in sorted(names)}

    def _dims(self, name: str, atom: Atom) -> int:
        """Dimensions of a parameter in its layer."""
        return len(atom.shape) - (_STACKED.match(name) is not None)

    def _trimmed(self, name: str, state: str, atom: Atom) -> Atom:
        """A tensor without the rows that fill the vocabulary up."""
        if not _VOCABULARY.fullmatch(name) or not atom.shape:
            return atom
        sizes = self._common.vocabulary
        if sizes is None:
            if not state:
                self.remarks.append(f"{name} may have rows of padding: the vocabulary is not known")
            return atom
        size, padded = sizes
        if size == padded or atom.shape[0] != padded:
            return atom
        if not state:
            self._look_at_padding(name, atom, size)
        shape = (size, *atom.shape[1:])
        rows, _, common = overlaps(atom.pieces.boxes, Boxes.whole(shape))
        return dataclasses.replace(atom, shape=shape, pieces=atom.pieces.cut(rows, common))

    def _look_at_padding(self, name: str, atom: Atom, size: int) -> None:
        """Say how many rows are left out, and whether there is something in them."""
        shape = (atom.shape[0] - size, *atom.shape[1:])
        what = f"{shape[0]} rows of padding of {name} are left out"
        room = np.zeros(shape, item_type(atom.dtype.itemsize))
        if room.nbytes <= _LARGEST_PADDING:
            read_box(self._files, atom, (size, *(0 for _ in shape[1:])), room)
            filled = room.view(np.uint8).reshape(shape[0], -1).any(axis=1).sum()
            what += f", {filled} of them are not zero" if filled else ", all zero"
        self.remarks.append(what)
