"""Tensors of a view, read the plain way: what tests compare bit for bit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from core_ucp.execution.gathering import item_type, read_pieces
from core_ucp.view.files import Files
from core_ucp.view.pieces import Pieces
from core_ucp.view.view import Atom, View


def tensor(view: View, atom: Atom) -> Tensor:
    """A whole atom."""
    return _filled(view.files, atom, atom.pieces, bytes(atom.nbytes))


def replica(view: View, atom: Atom) -> Tensor:
    """A whole atom, from its further copies where there are any."""
    first = _bytes(tensor(view, atom))
    pieces = atom.pieces if atom.replicas is None else atom.replicas
    return _filled(view.files, atom, pieces, first)


def _filled(files: Files, atom: Atom, pieces: Pieces, start: bytes) -> Tensor:
    data = bytearray(start)
    items = np.frombuffer(data, item_type(atom.dtype.itemsize)).reshape(atom.shape)
    read_pieces(files, pieces, [0] * len(atom.shape), items)
    flat = torch.from_numpy(np.frombuffer(data, np.uint8)) if data else torch.empty(0).byte()
    return flat.view(atom.dtype).reshape(atom.shape)


def _bytes(tensor: Tensor) -> bytes:
    """All elements in row-major order; a view of one element can have any stride."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes()


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """Dtype, shape and bytes: equal only if every bit is."""
    return tensor.dtype, tuple(tensor.shape), _bytes(tensor)


def snapshot(view: View) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Bits of all atoms by key."""
    return {key: bits(tensor(view, atom)) for key, atom in view.atoms.items()}
