"""A peer in another process, with packages of its own and a clock of its own.

One line of JSON goes there for each step: requests that are new. One comes back: tokens, whether
anything is left to do, and the processor seconds that the child has used.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, cast

from core.engines import Request, Token
from core.errors import EngineError
from core_splitfuse.benchmarking.peers.peer import MissingPeerError

CHILDREN = Path(__file__).parent / "children"
_TAIL = 2000
_PATIENCE = 10


class Child:
    """Serves through a script of :mod:`core_splitfuse.benchmarking.peers.children`.

    Args:
        python: interpreter of the environment that has the peer.
        script: file name of the script.
        arguments: of the script, one JSON object.
        environment: variables to set beside the present ones.

    Raises:
        EngineError: when it does not start; the end of its log is the reason.
    """

    def __init__(
        self,
        python: str,
        script: str,
        arguments: Mapping[str, object],
        environment: Mapping[str, str],
    ) -> None:
        # What the child prints lives as long as the child.
        self._log = TemporaryFile()  # noqa: SIM115
        self._used, self._busy = 0.0, False
        self._new: list[list[object]] = []
        self._count = 0
        self._process = subprocess.Popen(
            [python, str(CHILDREN / script), json.dumps(dict(arguments))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **environment},
        )
        self._take(self._answer())

    @property
    def busy(self) -> bool:
        return self._busy or bool(self._new)

    def seconds(self) -> float:
        """Processor seconds that the child has used."""
        return self._used

    def add(self, request: Request) -> int:
        self._count += 1
        self._new.append([self._count, list(request.prompt), request.sampling.max_new_tokens])
        return self._count

    def step(self) -> list[Token]:
        self._send({"add": self._new})
        self._new = []
        return self._take(self._answer())

    def close(self) -> None:
        """End the child; it gets ten seconds to go by itself."""
        self._end()
        self._log.close()

    def _end(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _take(self, found: Mapping[str, Any]) -> list[Token]:
        self._used, self._busy = float(found["seconds"]), bool(found["busy"])
        made: Sequence[tuple[int, int, bool]] = found["tokens"]
        return [
            Token(request=request, id=token, finish="length" if ended else None)
            for request, token, ended in made
        ]

    def _send(self, line: Mapping[str, object]) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        try:
            pipe.write(json.dumps(line).encode() + b"\n")
            pipe.flush()
        except OSError:
            raise self._gone() from None

    def _answer(self) -> Mapping[str, Any]:
        pipe = self._process.stdout
        assert pipe is not None
        line = pipe.readline()
        if not line:
            raise self._gone()
        return cast("Mapping[str, Any]", json.loads(line))

    def _gone(self) -> EngineError:
        self._end()
        self._log.seek(0)
        text = self._log.read().decode(errors="replace")[-_TAIL:]
        return EngineError("the peer's process ended", why=text.strip() or "it said nothing")


def require(python: str, package: str, fix: str) -> None:
    """See whether an interpreter has a package.

    Raises:
        MissingPeerError: when it has not.
    """
    found = f"from importlib.util import find_spec; exit(find_spec({package!r}) is None)"
    try:
        done = subprocess.run([python, "-c", found], capture_output=True, check=False)
    except OSError as error:
        raise MissingPeerError(f"{python} does not run", why=str(error), fix=fix) from None
    if done.returncode:
        raise MissingPeerError(f"{package} is not installed for {python}", fix=fix)
