"""A checkpoint as a set of atoms, each with the places of its elements in files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from core.errors import CheckpointError
from core_ucp.view.boxes import untiled
from core_ucp.view.files import Files
from core_ucp.view.pieces import Pieces

_LARGEST = 2**62
"""Bytes of a tensor stay below this, so that tables can count them."""

Relation = Literal["elementwise", "scalar", "reduced", "opaque"]
"""How a tensor belongs to its parameter: element by element, one number, with dimensions reduced
(the rows and columns of Adafactor), or in a way that nobody may cut (8-bit blocks, packed bits)."""


@dataclass(frozen=True, eq=False)
class Atom:
    """One logical tensor of a checkpoint: a weight, or one state of the optimizer for it.

    Attributes:
        shape: of the whole tensor, without padding.
        dtype: of its elements.
        pieces: boxes that tile it exactly once, and where they lie.
        relation: how a state belongs to its parameter.
        replicas: further copies of boxes of it, which must hold the same bits.
        exponent: its elements are those stored times two to this power.
        stored_as: dtype in the files, from which elements are rounded; the same unless given.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Pieces
    relation: Relation = "elementwise"
    replicas: Pieces | None = None
    exponent: int = 0
    stored_as: torch.dtype | None = None

    @property
    def stored(self) -> torch.dtype:
        """The dtype in the files."""
        return self.stored_as or self.dtype

    @property
    def exact(self) -> bool:
        """Whether its elements are bit for bit those in the files."""
        return self.stored == self.dtype and not self.exponent

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Resume:
    """What a run needs beside tensors to go on as if nothing had happened.

    Attributes:
        step: optimizer steps done, where known.
        optimizer: class of the optimizer, such as ``AdamW``, where known.
        hyper: hyper-parameters (``lr``, ``betas``, ``weight_decay``, ...) by parameter name.
        scheduler: state of the learning-rate schedule.
        scaler: state of the loss scaler.
        counters: consumed samples, skipped steps and the like.
        client: plain values that the user has saved along.
    """

    step: int | None = None
    optimizer: str = ""
    hyper: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    scaler: Mapping[str, Any] = field(default_factory=dict)
    counters: Mapping[str, int | float] = field(default_factory=dict)
    client: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class View:
    """Everything that a checkpoint holds; tensors by reference, nothing of them is read.

    Attributes:
        path: file or folder that was opened.
        framework: who wrote it, such as ``deepspeed``.
        files: the files that pieces refer to by index.
        atoms: tensors by key (:mod:`core_ucp.view.keys`). A weight that exists in full and in half
            precision is here in full precision.
        aliases: parameter names that stand for the same tensor as another one, which is named.
        twins: half-precision copies of weights by key, equal to the rounded atom.
        resume: everything that is no tensor.
        mesh: sizes of the parallel dimensions that wrote it, such as ``{"dp": 4, "tp": 2}``.
        details: further facts for `core ucp inspect`, such as the ZeRO stage.
        remarks: what a user should know: what is missing, stale or was re-derived.
        lossy: steps that cannot be undone, such as an average of replicas.
        digests: of atoms by key, as they were noted when the checkpoint was written.
    """

    path: Path
    framework: str
    files: Files
    atoms: Mapping[str, Atom]
    aliases: Mapping[str, str] = field(default_factory=dict)
    twins: Mapping[str, Atom] = field(default_factory=dict)
    resume: Resume = field(default_factory=Resume)
    mesh: Mapping[str, int] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    remarks: Sequence[str] = ()
    lossy: Sequence[str] = ()
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all atoms."""
        return sum(atom.nbytes for atom in self.atoms.values())

    def prove(self) -> None:
        """Make sure that the pieces of every atom tile it exactly once and lie in their files.

        Raises:
            CheckpointError: naming the atom, the range, and the file.
        """
        for key, atom in self.atoms.items():
            if atom.numel * max(atom.dtype.itemsize, atom.stored.itemsize) >= _LARGEST:
                raise CheckpointError(f"{key} of {self.path} is of {list(atom.shape)}")
            problem = untiled(atom.shape, atom.pieces.boxes)
            if problem:
                raise CheckpointError(f"{self.path} does not hold {key} as a whole", why=problem)
            self.files.require(key, atom.pieces, atom.stored.itemsize)
