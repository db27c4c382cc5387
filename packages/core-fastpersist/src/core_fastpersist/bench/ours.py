"""The ways of this package to save and load, in the terms of :mod:`core_fastpersist.bench.peers`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from core_fastpersist.arena import adopt
from core_fastpersist.bench.peers import Load, Save, alone
from core_fastpersist.bench.state import State
from core_fastpersist.dcp.native import NativeWriter
from core_fastpersist.dcp.staging import Staging
from core_fastpersist.files.loading import load
from core_fastpersist.files.storing import save

NAME = "fastpersist"
PLAIN = f"{NAME}: save"
ADOPTED = f"{NAME}: save, adopted"
NATIVE = f"{NAME}: dcp.save"


def saves(state: State) -> dict[str, Save]:
    """The ways to save ``state``: from where the tensors lie, copied, adopted, and as DCP."""
    staging = Staging()
    own = _adopted(state)

    def native(path: Path) -> None:
        with alone():
            dcp_save(dict(state), storage_writer=NativeWriter(path, staging), no_dist=True)

    return {
        PLAIN: lambda path: save(state, path),
        ADOPTED: lambda path: save(own, path),
        NATIVE: native,
    }


def _adopted(state: State) -> State:
    """A copy of a state that lies as a file does."""
    copies = nn.ParameterList([tensor.clone() for tensor in state.values()])
    adopt(copies)
    return {name: copy.detach() for name, copy in zip(state, copies, strict=True)}


def loads(state: State) -> dict[str, tuple[str, Load]]:
    """The ways to load, into new memory and into tensors that are there."""
    room = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    for tensor in room.values():
        tensor.zero_()  # a first touch is no part of loading into what is there

    def into(path: Path) -> State:
        load(path, into=room)
        return room

    return {f"{NAME}: load": (PLAIN, load), f"{NAME}: load, into": (PLAIN, into)}
