"""Staging: what happens between the submit of a checkpoint and the moment training goes on.

Decoupled checkpointing (FastPersist, arXiv 2406.13768): writing overlaps the next forward and backward
pass, and only the next optimizer step has to wait for it. Mode ``copy`` stages into an area that is
kept from checkpoint to checkpoint, and nothing has to wait. Mode ``live`` copies nothing that has
proven to keep still: tensors are written from where they lie, and ``staged`` tells when that is done.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict, unflatten_state_dict

from core_fastpersist.dcp.area import StagingArea, size_of
from core_fastpersist.dcp.audit import Audit
from core_fastpersist.direct.carrier import Carrier, ThreadCarrier
from core_fastpersist.direct.newfile import WriteOptions
from core_fastpersist.direct.remote import ProcessCarrier
from core_fastpersist.host import available_memory

logger = logging.getLogger("core_fastpersist")
Mode = Literal["auto", "copy", "live"]
Writer = Literal["auto", "thread", "process"]


@dataclass
class Staged:
    """One staged checkpoint.

    Attributes:
        state: what the writer gets: the state with copies, or a future of it while a GPU copies.
        live: done when the live tensors in it have been read; ``None`` where it has none.
        area: where its copies are.
        over: whether the writer needs it no longer.
    """

    state: dict[str, Any] | Future[dict[str, Any]]
    live: Future[None] | None
    area: StagingArea
    over: bool = False

    def release(self) -> None:
        """Told by the writer when it needs the tensors no longer."""
        self.over = True
        if self.live is not None and not self.live.done():
            self.live.set_result(None)


class Staging:
    """Stages the checkpoints of one run, one after the other, and gives them a carrier.

    Args:
        mode: ``copy``, ``live``, or ``auto``: ``copy`` where the copies fit into ``memory``.
        writer: ``process`` writes copies in a process of its own, which training cannot hold up;
            ``thread`` in threads of this one; ``auto`` is ``process`` for copies. What lies in
            live tensors is always written by threads.
        memory: bytes that copies may take; half of the available memory unless given.
        audits: checkpoints in which a tensor must have kept still before it is read late.
        options: how files are written.
    """

    def __init__(
        self,
        *,
        mode: Mode = "auto",
        writer: Writer = "auto",
        memory: int | None = None,
        audits: int = 2,
        options: WriteOptions | None = None,
    ) -> None:
        self.mode: Mode = mode
        self.writer: Writer = writer
        self.memory = memory
        self.options = options or WriteOptions()
        self.audit = Audit(audits)
        self._area = StagingArea()
        self._last: Staged | None = None
        self._process: ProcessCarrier | None = None
        self._waiting = ThreadPoolExecutor(1, "fastpersist-stage")

    def stage(self, state: Mapping[str, Any]) -> Staged:
        """Stage a state dict of live tensors and plain values.

        Where the checkpoint before this one is still being written, its copies stay, and the new
        ones take memory of their own.
        """
        if self._last is not None and not self._last.over:
            self._area = StagingArea()
        flat, mappings = flattened(state)
        tensors = {name: leaf for name, leaf in flat.items() if isinstance(leaf, Tensor)}
        live = self._effective_mode(tensors) == "live"
        chosen = self.audit.unproven(tensors) if live else tensors.keys()
        copies, event = self._area.copy({n: t for n, t in tensors.items() if n in chosen})
        if live:
            self.audit.watch(tensors, copies)
        plain = {n: copy.deepcopy(leaf) for n, leaf in flat.items() if n not in tensors}
        staged: dict[str, Any] = {**flat, **plain, **copies}
        if mappings is not None:
            staged = unflatten_state_dict(staged, mappings)
        late: Future[None] | None = Future() if chosen != tensors.keys() else None
        now = staged if event is None else self._waiting.submit(_after, event, staged)
        self._last = Staged(now, late, self._area)
        return self._last

    def carrier(self, staged: Staged | None) -> Carrier:
        """What writes a checkpoint; ``None`` for one that was not staged."""
        arena = None if staged is None else staged.area.shared
        if staged is None or arena is None or staged.live is not None or self.writer == "thread":
            return ThreadCarrier(self.options)
        found = self._process
        if found is None or not found.alive or found.arena is not arena:
            self._end_process()
            found = self._process = ProcessCarrier(arena, self.options)
        return found

    def close(self) -> None:
        """Stop watching, end the writer process, and free the memory."""
        self.audit.close()
        self._waiting.shutdown()
        self._end_process()
        self._area.close()

    def _effective_mode(self, tensors: Mapping[str, Tensor]) -> Mode:
        if self.mode != "auto":
            return self.mode
        if self.memory is None:
            self.memory = available_memory() // 2
        needed = size_of(tensors)
        if needed <= self.memory:
            return "copy"
        logger.info(
            "copies of %s bytes do not fit into %s; live tensors are written, and the next"
            " optimizer step waits for that",
            f"{needed:,}",
            f"{self.memory:,}",
        )
        return "live"

    def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.close()


def flattened(state: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """A state dict by dotted names, and how to nest it again; ``None`` where it is flat already."""
    if all(isinstance(leaf, Tensor) for leaf in state.values()):
        return dict(state), None
    return flatten_state_dict(dict(state))


def _after(event: Any, staged: dict[str, Any]) -> dict[str, Any]:
    event.synchronize()
    return staged
