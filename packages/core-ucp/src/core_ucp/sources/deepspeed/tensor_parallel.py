"""Tensor parallelism: the shares of ranks put together by the layouts of their parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from core.errors import CheckpointError
from core_ucp.files.pickles import Inert
from core_ucp.layout.deepspeed import from_deepspeed
from core_ucp.layout.gather import first_copies
from core_ucp.layout.holders import Replicate
from core_ucp.layout.layout import Layout
from core_ucp.layout.mesh import Coordinate, Mesh
from core_ucp.layout.rules import Rules
from core_ucp.sources.deepspeed.content import Content, Model
from core_ucp.sources.deepspeed.shares import Share
from core_ucp.view.boxes import Boxes, join as join_boxes, overlaps
from core_ucp.view.keys import parse_key
from core_ucp.view.pieces import Pieces, join, nowhere
from core_ucp.view.view import Atom

INFO = "universal_checkpoint_info"


def layouts_of(
    content: Content, model: Model, names: Sequence[str], rules: Rules | None
) -> dict[str, Layout]:
    """How parameters lie over the tensor-parallel ranks.

    Args:
        content: of the checkpoint.
        model: file that may say so itself.
        names: of the parameters.
        rules: of the user, which count more than what the file says.

    Raises:
        CheckpointError: when nobody says so.
    """
    if rules is None:
        info = plain_info(model.tree.get(INFO))
        if not any(key.endswith(("_patterns", "sub_params")) for key in info):
            raise content.fail(
                f"is cut over {content.tp} tensor-parallel ranks, and does not say how",
                why=f"{model.name} has no patterns in its {INFO}",
                fix="describe the parameters in a file of rules, and name it with --rules",
            )
        rules = from_deepspeed(info, Mesh({"tp": content.tp}))
    return {name: rule.layout for name, rule in rules.assign(names).items()}


def plain_info(value: Any) -> dict[str, Any]:
    """What DeepSpeed says of its parameters, with inert objects as their attributes."""
    found = _plain(value)
    return {str(key): item for key, item in found.items()} if isinstance(found, dict) else {}


def _plain(value: Any) -> Any:
    if isinstance(value, Inert):
        return _plain(value.state)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return value


def join_shares(
    content: Content, shares: Sequence[Share], layout_of: Callable[[str], Layout]
) -> Share:
    """Put the shares of all tensor-parallel ranks of one pipeline stage together.

    Raises:
        CheckpointError: when parts do not fit together, naming the parameter.
    """
    whole = Share(aliases=dict(shares[0].aliases), hyper=dict(shares[0].hyper))
    joiner = _Joiner(content, Mesh({"tp": len(shares)}))
    for key in shares[0].atoms:
        part = parse_key(key)
        parts = _parts(content, key, [share.atoms for share in shares])
        layout = layout_of(part.parameter) if part and parts[0].relation != "scalar" else None
        whole.atoms[key] = joiner.join(key, layout or Replicate(), parts)
    for name in shares[0].halves:
        parts = _parts(content, name, [share.halves for share in shares])
        whole.halves[name] = joiner.join(name, layout_of(name), parts)
    return whole


def _parts(content: Content, key: str, atoms: Sequence[Mapping[str, Atom]]) -> list[Atom]:
    missing = next((rank for rank, held in enumerate(atoms) if key not in held), None)
    if missing is not None:
        raise content.fail(f"does not hold {key} of tensor-parallel rank {missing}")
    return [held[key] for held in atoms]


class _Joiner:
    """Joins atoms over one mesh; placements are computed once for all states of a parameter."""

    def __init__(self, content: Content, mesh: Mesh) -> None:
        self._content, self._mesh = content, mesh
        self._placed: dict[Any, tuple[tuple[int, ...], list[_Placed]]] = {}

    def join(self, key: str, layout: Layout, parts: Sequence[Atom]) -> Atom:
        """The atom whose parts the ranks hold."""
        if len({part.dtype for part in parts}) > 1:
            raise self._content.fail(f"holds {key} in several dtypes")
        shapes = tuple(part.shape for part in parts)
        part = parse_key(key)
        memo = (part.parameter if part else key, shapes)
        if memo not in self._placed:
            self._placed[memo] = self._place(memo[0], layout, shapes)
        whole, placed = self._placed[memo]
        found = [_moved(atom.pieces, place) for atom, place in zip(parts, placed, strict=True)]
        copies = [
            _moved(atom.replicas, place)
            for atom, place in zip(parts, placed, strict=True)
            if atom.replicas is not None
        ]
        first = [pieces for pieces, _ in found]
        further = [pieces for _, pieces in found] + [p for pair in copies for p in pair]
        pieces = join(first) if first else nowhere(len(whole))
        replicas = join(further)
        return Atom(
            whole, parts[0].dtype, pieces, parts[0].relation, replicas if len(replicas) else None
        )

    def _place(
        self, name: str, layout: Layout, shapes: Sequence[tuple[int, ...]]
    ) -> tuple[tuple[int, ...], list[_Placed]]:
        local: dict[Coordinate, tuple[int, ...]] = {
            (rank,): shape for rank, shape in enumerate(shapes)
        }
        try:
            fitted, whole = layout.fitted(local, self._mesh)
            placements = [fitted.place(whole, self._mesh, (rank,)) for rank in range(len(shapes))]
        except CheckpointError as error:
            raise CheckpointError(
                f"{name} cannot be put together: {error.what}", why=error.why, fix=error.fix
            ) from error
        kept = first_copies(join_boxes([place.boxes for place in placements]))
        bounds = np.cumsum([0, *(len(place.boxes) for place in placements)])
        placed = [
            _Placed(place.boxes, place.local, kept[bounds[row] : bounds[row + 1]])
            for row, place in enumerate(placements)
        ]
        return whole, placed


class _Placed:
    """Boxes of the whole tensor, where they begin in a rank's own, and which are no copies."""

    def __init__(self, boxes: Boxes, local: Any, kept: Any) -> None:
        self.boxes, self.local, self.kept = boxes, local, kept


def _moved(pieces: Pieces, place: _Placed) -> tuple[Pieces, Pieces]:
    """Pieces of a rank's own tensor as those of the whole: first copies, and further ones."""
    own = Boxes(place.local, place.boxes.size)
    if not own.start.shape[1]:
        rows = np.zeros(len(pieces), np.int64)
        moved = pieces if len(own) else pieces.take(rows[:0])
    else:
        rows, cut, common = overlaps(own, pieces.boxes)
        moved = pieces.cut(cut, common)
        shift = (place.boxes.start - place.local)[rows]
        boxes = Boxes(common.start + shift, common.size)
        moved = Pieces(boxes, moved.file, moved.offset, moved.stride)
    first = place.kept[rows] if len(moved) else np.zeros(0, np.bool_)
    return moved.take(first), moved.take(~first)
