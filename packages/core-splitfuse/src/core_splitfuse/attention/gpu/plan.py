"""The description of one pass on the device: made once, read by all layers.

Everything that layers need is decided on the host, which knows all lengths, and goes to the device
in one copy. With room for a fixed size the addresses stay, so that CUDA graphs can be replayed, and
what a pass does not fill is padding that computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from core.errors import EngineError
from core_splitfuse.attention.gpu.atoms import Cut, Kind, Listed, Numbers, Row, Spread, listed
from core_splitfuse.attention.gpu.packing import packed, padded, views_of
from core_splitfuse.attention.gpu.tiles import device_of


class Span(Protocol):
    """Tokens of one sequence in a pass; :class:`core_splitfuse.attention.spans.Span` is one."""

    @property
    def begin(self) -> int:
        """Tokens that are in the store already."""
        ...

    @property
    def end(self) -> int:
        """Tokens that are in the store when the pass is done."""
        ...

    @property
    def table(self) -> Sequence[int]:
        """Blocks that hold them."""
        ...


@dataclass(frozen=True)
class Room:
    """Sizes that a plan is padded to.

    Args:
        tokens: of the packed row.
        sequences: at most.
        blocks: of a sequence at most.
        rows: tokens whose logits are wanted, at most.
        decodes: whether every sequence has one token; there is nothing for chunks then.
    """

    tokens: int
    sequences: int
    blocks: int
    rows: int = 0
    decodes: bool = False


@dataclass(frozen=True)
class Launch:
    """One launch over atoms, and the merge after it.

    Args:
        atoms: (A, 8) int32.
        merges: (M, 4) int32.
        parts: places for parts, each for one token.
    """

    atoms: Tensor
    merges: Tensor
    parts: int


@dataclass(frozen=True)
class Launches:
    """What one kind of layer launches."""

    decodes: Launch
    chunks: Launch


@dataclass(frozen=True)
class _Lists:
    """Both launches on the host."""

    decodes: Listed
    chunks: Listed

    def arrays(self, prefix: str) -> dict[str, Numbers]:
        """All arrays by name."""
        return {
            f"{prefix}decode atoms": self.decodes.atoms,
            f"{prefix}decode merges": self.decodes.merges,
            f"{prefix}chunk atoms": self.chunks.atoms,
            f"{prefix}chunk merges": self.chunks.merges,
        }

    def on_device(self, prefix: str, views: dict[str, Tensor]) -> Launches:
        """The same on the device."""
        atoms, merges, chunk_atoms, chunk_merges = (views[name] for name in self.arrays(prefix))
        return Launches(
            Launch(atoms, merges, self.decodes.parts),
            Launch(chunk_atoms, chunk_merges, self.chunks.parts),
        )


class Plan:
    """One pass after the other; ``fill`` says what the next one computes.

    Args:
        block_size: tokens in a block of the store.
        device: where the store is.
        room: sizes to pad to, which fixes the addresses of all tensors; ``None`` follows the pass.
        spread: how programs share keys; by the device unless given.

    Example::

        plan = Plan(64, device)
        plan.fill(spans)
        for keys, values in layers:
            write(keys, values, key, value, plan.slots)
            attend(query, keys, values, plan, rule)
    """

    def __init__(
        self,
        block_size: int,
        device: torch.device,
        *,
        room: Room | None = None,
        spread: Spread | None = None,
    ) -> None:
        self.block_size = block_size
        self.device = device
        self.room = room
        self.spread = spread or Spread(device_of(device).processors)
        self.tokens = 0
        self.longest_query = 0
        self.longest_key = 0
        self._kinds: dict[Kind, Launches] = {}
        self._row = Row(*(np.zeros(0, np.int32) for _ in range(3)))
        self._memory: Tensor | None = None
        self._views: dict[str, Tensor] = {}

    @classmethod
    def make(
        cls,
        spans: Sequence[Span],
        block_size: int,
        device: torch.device,
        *,
        spread: Spread | None = None,
    ) -> Self:
        """Describe a single pass."""
        return cls(block_size, device, spread=spread).fill(spans)

    @property
    def tables(self) -> Tensor:
        """(S, blocks) int32 blocks of every sequence."""
        return self._views["tables"]

    @property
    def starts(self) -> Tensor:
        """(S + 1,) int32 rows at which sequences begin."""
        return self._views["starts"]

    @property
    def lengths(self) -> Tensor:
        """(S,) int32 tokens of every sequence in the store, with those of this pass."""
        return self._views["lengths"]

    @property
    def slots(self) -> Tensor:
        """(T,) int32 where the store keeps every token; negative for padding."""
        return self._views["slots"]

    @property
    def positions(self) -> Tensor:
        """(T,) int32 position of every token in its sequence; zero for padding."""
        return self._views["positions"]

    @property
    def ids(self) -> Tensor:
        """(T,) int32 token ids, where ``fill`` was told; zero for padding."""
        return self._views["ids"]

    @property
    def rows(self) -> Tensor:
        """(R,) int32 tokens whose logits are wanted, where ``fill`` was told; zero for padding."""
        return self._views["rows"]

    def fill(
        self, spans: Sequence[Span], ids: Sequence[int] = (), rows: Sequence[int] = ()
    ) -> Self:
        """Describe a pass.

        Args:
            spans: sequences, each with one token or more, in the order of the packed row.
            ids: token ids of the packed row; they go along in the same copy.
            rows: tokens whose logits are wanted; they go along, too.

        Raises:
            EngineError: for a pass that is larger than the room, or a table that is too short.
        """
        begins = np.fromiter((s.begin for s in spans), np.int32, len(spans))
        ends = np.fromiter((s.end for s in spans), np.int32, len(spans))
        counts = ends - begins
        if not len(spans) or counts.min() < 1 or begins.min() < 0:
            raise EngineError("a pass needs sequences, and all of them a token at least")
        starts = np.cumsum(counts, dtype=np.int32) - counts
        self._row = Row(starts, begins, counts)
        self._require_room(len(rows))
        self.tokens = self.room.tokens if self.room else int(counts.sum())
        self.longest_query, self.longest_key = int(counts.max()), int(ends.max())
        if self.room is not None:
            self.longest_query = 1 if self.room.decodes else self.tokens
            self.longest_key = self.room.blocks * self.block_size
        self._upload(spans, ends, ids, rows)
        return self

    def launches(self, kind: Kind) -> Launches:
        """Atoms for one kind of layer; from the second pass on they are there already."""
        if kind not in self._kinds:
            if self._capturing():
                raise EngineError("a graph met a kind of layer that no pass before it had")
            lists = self._lists(kind)
            arrays = lists.arrays("")
            memory = packed(arrays, pinned=self.device.type == "cuda").to(
                self.device, non_blocking=True
            )
            self._kinds[kind] = lists.on_device("", views_of(memory, arrays))
        return self._kinds[kind]

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _upload(
        self, spans: Sequence[Span], ends: Numbers, ids: Sequence[int], rows: Sequence[int]
    ) -> None:
        """All numbers of the pass in one copy."""
        arrays = self._common(spans, ends)
        room = self.room or Room(len(ids), 0, 0, rows=len(rows))
        arrays["ids"] = padded(np.array(ids, np.int32), room.tokens, 0)
        arrays["rows"] = padded(np.array(rows, np.int32), room.rows, 0)
        lists = {kind: self._lists(kind) for kind in self._kinds}
        for index, both in enumerate(lists.values()):
            arrays |= both.arrays(f"{index} ")
        memory = packed(arrays, pinned=self.device.type == "cuda")
        if self._memory is None or self._memory.shape != memory.shape:
            self._memory = torch.empty_like(memory, device=self.device, pin_memory=False)
        self._memory.copy_(memory, non_blocking=True)
        self._views = views_of(self._memory, arrays)
        for index, (kind, both) in enumerate(lists.items()):
            self._kinds[kind] = both.on_device(f"{index} ", self._views)

    def _common(self, spans: Sequence[Span], ends: Numbers) -> dict[str, Numbers]:
        row, size = self._row, self.block_size
        used = -(-ends // size)
        room = self.room or Room(int(row.counts.sum()), len(spans), int(used.max()))
        if any(len(s.table) < need for s, need in zip(spans, used.tolist(), strict=True)):
            raise EngineError("a sequence has fewer blocks than tokens to keep")
        tables = np.zeros((room.sequences, room.blocks), np.int32)
        filled = np.arange(room.blocks) < used[:, None]
        tables[: len(spans)][filled] = np.fromiter(
            chain.from_iterable(s.table[:n] for s, n in zip(spans, used.tolist(), strict=True)),
            np.int32,
            int(used.sum()),
        )
        owner = np.repeat(np.arange(len(spans)), row.counts)
        at = np.arange(len(owner)) - row.starts[owner] + row.begins[owner]
        slots = tables[owner, at // size] * size + at % size
        return {
            "tables": tables,
            "starts": padded(np.append(row.starts, len(owner)), room.sequences + 1, len(owner)),
            "lengths": padded(ends, room.sequences, 0),
            "slots": padded(slots, room.tokens, -1),
            "positions": padded(at, room.tokens, 0),
        }

    def _lists(self, kind: Kind) -> _Lists:
        """Atoms of both launches of a kind."""
        row = self._padded_row()
        last = len(self._row.counts) - 1
        sequences = np.minimum(np.arange(len(row.counts), dtype=np.int32), last)
        short = row.counts <= kind.decodes.tokens
        if self.room is not None and self.room.decodes:
            short[:] = True
        made: list[Listed] = []
        for cut, chosen in ((kind.decodes, short), (kind.chunks, ~short)):
            part = listed(sequences[chosen], row.only(chosen), cut, kind.window, self.spread)
            made.append(self._with_room(part, cut, kind.decodes.tokens))
        return _Lists(*made)

    def _with_room(self, made: Listed, cut: Cut, short: int) -> Listed:
        """Filled up to what a pass of the room's size can need."""
        room = self.room
        if room is None:
            return made
        if cut.short:
            atoms = room.tokens if room.decodes else min(room.sequences + 1, room.tokens)
        else:
            long = min(room.sequences + 1, room.tokens // (short + 1))
            atoms = long + room.tokens // cut.tokens
        if room.decodes and not cut.short:
            return Listed(made.atoms, made.merges, 0)
        most = self.spread.most(atoms, room.blocks * self.block_size, cut)
        merged = self.spread.merged(room.tokens, cut)
        parts = most * (1 if room.decodes else cut.tokens) if merged else 0
        return Listed(padded(made.atoms, most, 0), padded(made.merges, merged, 0), parts)

    def _padded_row(self) -> Row:
        """The sequences, and one without keys for the rows that are padding."""
        row = self._row
        missing = self.tokens - int(row.counts.sum())
        if not missing:
            return row
        added = self.tokens - missing, -missing, missing
        parts = zip((row.starts, row.begins, row.counts), added, strict=True)
        return Row(*(np.append(part, np.int32(new)) for part, new in parts))

    def _require_room(self, rows: int) -> None:
        row, room = self._row, self.room
        if room is None:
            return
        most = int((row.begins + row.counts).max())
        fits = (
            row.counts.sum() <= room.tokens
            and len(row.counts) <= room.sequences
            and most <= room.blocks * self.block_size
            and rows <= room.rows
        )
        if not fits:
            tokens = int(row.counts.sum())
            what = f"{tokens} tokens of {len(row.counts)} sequences, the longest of {most}"
            raise EngineError(f"a pass of {what}, does not fit", why=f"there is {room}")
        if room.decodes and int(row.counts.max()) > 1:
            raise EngineError("a pass with chunks does not fit", why=f"there is {room}")
