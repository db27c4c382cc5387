"""The writer process: takes file images in shared memory, and writes them until its peer is gone.

Started by :class:`core_fastpersist.direct.remote.ProcessCarrier`. It imports no torch, takes no
pickles, and shares no interpreter lock with the training loop.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from core.errors import CheckpointError
from core_fastpersist.direct.carrier import ThreadCarrier
from core_fastpersist.direct.memory import shared_pages
from core_fastpersist.direct.newfile import WriteOptions
from core_fastpersist.direct.pieces import HostBytes, Piece

_NICE = 10


def serve(connection: Connection, arena: memoryview) -> None:
    """Answer requests until the other side closes."""
    image = _Image(arena)
    while True:
        try:
            request = json.loads(connection.recv_bytes())
            inline = connection.recv_bytes()
        except (EOFError, ConnectionError):
            return
        connection.send_bytes(json.dumps(_answer(request, inline, image)).encode())


class _Image:
    """What a file is made of, and how it is written; kept for requests that do not say."""

    def __init__(self, arena: memoryview) -> None:
        self._arena = arena
        self.pieces: list[Piece] = []
        self.carrier = ThreadCarrier()

    def update(self, request: dict[str, Any], inline: bytes) -> None:
        """Take what a request says of it."""
        if "pieces" in request:
            self.pieces = _pieces(request["pieces"], memoryview(inline), self._arena)
            self.carrier = ThreadCarrier(WriteOptions(**request["options"]))


def _answer(request: dict[str, Any], inline: bytes, image: _Image) -> dict[str, Any]:
    try:
        image.update(request, inline)
        digests = image.carrier.write(Path(request["path"]), request["size"], image.pieces)
    except CheckpointError as error:
        return {"error": [error.what, error.why, error.fix]}
    except Exception as error:
        return {
            "error": [f"cannot write {request['path']}", f"{type(error).__name__}: {error}", ""]
        }
    return {"digests": digests.as_json()}


def _pieces(rows: list[list[int]], inline: memoryview, arena: memoryview) -> list[Piece]:
    """Pieces from rows of file offset, place in the arena (or -1 for inline) and length."""
    pieces = []
    taken = 0
    for offset, place, length in rows:
        if place < 0:
            view, taken = inline[taken : taken + length], taken + length
        else:
            view = arena[place : place + length]
        pieces.append(Piece(offset, HostBytes(view)))
    return pieces


def _leave_with(connection: Connection, trainer: int) -> None:
    """End at once when the trainer is gone: nobody is left to hear how a write went."""
    watch = select.poll()
    watch.register(connection.fileno(), select.POLLRDHUP | select.POLLHUP)
    # What a trainer forks, such as data loaders, holds the socket open and can outlive it.
    with suppress(OSError):
        watch.register(os.pidfd_open(trainer), select.POLLIN)
    if os.getppid() == trainer:
        watch.poll()
    os._exit(1)


def main() -> None:
    """Entry point: socket, descriptor and size of the arena, and the trainer's process id."""
    socket, descriptor, size, trainer = (int(argument) for argument in sys.argv[1:5])
    # An interrupt at the terminal is the trainer's to handle; this process ends with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Training goes first: writing waits for the disk most of the time anyway.
    os.nice(_NICE)
    connection = Connection(socket)
    threading.Thread(target=_leave_with, args=(connection, trainer), daemon=True).start()
    serve(connection, shared_pages(descriptor, size))


if __name__ == "__main__":
    main()
