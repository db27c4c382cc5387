"""A process that writes what lies in shared memory, while this one goes on computing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from core.errors import CheckpointError
from core_fastpersist.direct.digests import Digests
from core_fastpersist.direct.kernel import HUGE_PAGE, use_huge_pages
from core_fastpersist.direct.memory import address, shared_pages
from core_fastpersist.direct.newfile import WriteOptions
from core_fastpersist.direct.pieces import Piece

_PATIENCE = 0.5
"""Seconds between two looks at whether the writer process lives."""


class SharedArena:
    """Memory that a writer process can map: page-aligned, kept by this object.

    Args:
        size: bytes.
    """

    def __init__(self, size: int) -> None:
        huge = size >= HUGE_PAGE
        self.size = -(-size // HUGE_PAGE) * HUGE_PAGE if huge else max(size, 1)
        self.descriptor = os.memfd_create("core-fastpersist", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.descriptor, self.size)
            if huge:
                use_huge_pages(self.descriptor, self.size)
            self.view = shared_pages(self.descriptor, self.size)
        except BaseException:
            self.close()
            raise
        self.address = address(self.view)

    def place_of(self, view: memoryview | None) -> int:
        """Where in the arena a view lies, or -1 if elsewhere."""
        if view is None or view.nbytes == 0 or view.readonly:
            return -1
        place = address(view) - self.address
        inside = place >= 0 and place + view.nbytes <= self.size
        return place if inside else -1

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            self.close()

    def close(self) -> None:
        """Give up the descriptor; the memory goes with the last view of it."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class ProcessCarrier:
    """Writes in a process of its own, from a shared arena.

    Args:
        arena: where the large pieces lie; others are sent along.
        options: how files are written.
    """

    def __init__(self, arena: SharedArena, options: WriteOptions | None = None) -> None:
        self.options = options or WriteOptions()
        self.arena = arena
        self._lock = threading.Lock()
        # A run saves the same image again and again, and the process knows the places of the last.
        self._last: Sequence[Piece] | None = None
        ours, theirs = socket.socketpair()
        with theirs:
            descriptors = (theirs.fileno(), arena.descriptor)
            command = [sys.executable, "-P", "-m", "core_fastpersist.direct.worker"]
            command += map(str, (*descriptors, arena.size, os.getpid()))
            self._process = subprocess.Popen(
                command, pass_fds=descriptors, stdin=subprocess.DEVNULL
            )
        self._connection = Connection(ours.detach())

    @property
    def alive(self) -> bool:
        """Whether the process can take another file."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Process id of the writer."""
        return self._process.pid

    def write(self, path: Path, size: int, pieces: Sequence[Piece]) -> Digests:
        request: dict[str, Any] = {"path": str(path.absolute()), "size": size}
        inline = bytearray()
        with self._lock:
            if self._last is not pieces:
                rows, inline = self._rows(pieces)
                request |= {"pieces": rows, "options": asdict(self.options)}
                self._last = pieces if self._lasting(pieces) else None
            try:
                self._connection.send_bytes(json.dumps(request).encode())
                self._connection.send_bytes(inline)
                while not self._connection.poll(_PATIENCE):
                    if not self.alive:
                        raise EOFError
                answer: dict[str, Any] = json.loads(self._connection.recv_bytes())
            except (EOFError, OSError):
                path.unlink(missing_ok=True)
                raise CheckpointError(
                    f"cannot write {path}",
                    why=f"the writer process ended with {self._ending()}",
                    fix="look for an out-of-memory kill; the next checkpoint starts a new one",
                ) from None
        if "error" in answer:
            what, why, fix = answer["error"]
            raise CheckpointError(what, why=why, fix=fix)
        return Digests.from_json(answer["digests"])

    def close(self) -> None:
        """End the process; waits for a write that is under way."""
        with self._lock:
            self._connection.close()
        self._process.wait()

    def _rows(self, pieces: Sequence[Piece]) -> tuple[list[list[int]], bytearray]:
        rows: list[list[int]] = []
        inline = bytearray()
        for piece in pieces:
            place, length = self.arena.place_of(piece.source.view), piece.source.nbytes
            if place < 0 and length:
                begin = len(inline)
                inline += bytes(length)
                piece.source.copy(0, length, memoryview(inline)[begin:])
            rows.append([piece.offset, place, length])
        return rows, inline

    def _lasting(self, pieces: Sequence[Piece]) -> bool:
        """Whether all that was sent along is constant; what lies in the arena is read anew."""
        views = (piece.source.view for piece in pieces if piece.source.nbytes)
        return all(v is not None and (v.readonly or self.arena.place_of(v) >= 0) for v in views)

    def _ending(self) -> str:
        try:
            code = self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            return "a closed connection"
        return f"signal {-code}" if code < 0 else f"exit code {code}"
