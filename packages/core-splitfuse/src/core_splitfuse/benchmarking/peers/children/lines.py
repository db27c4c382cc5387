"""The child's end of the pipe; runs in the peer's environment, so it needs the standard library only."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Protocol


class Engine(Protocol):
    """What a script serves with."""

    def add(self, number: int, prompt: list[int], answer: int) -> None:
        """Queue a request for ``answer`` tokens."""

    def step(self) -> list[tuple[int, int, bool]]:
        """Run once; returns request, token, and whether it was the last one."""
        ...

    def busy(self) -> bool:
        """Whether anything is left to do."""
        ...


def own_output() -> int:
    """Keep standard output for the protocol: whatever a library prints goes to the log."""
    channel = os.dup(1)
    os.dup2(2, 1)
    return channel


def serve(engine: Engine, channel: int) -> None:
    """Answer line by line until the pipe is closed."""
    with os.fdopen(channel, "w") as out:
        _answer(out, [], engine.busy())
        for line in sys.stdin:
            for number, prompt, answer in json.loads(line)["add"]:
                engine.add(number, prompt, answer)
            made = engine.step()
            _answer(out, made, engine.busy())


def _answer(out: Any, made: list[tuple[int, int, bool]], busy: bool) -> None:
    found = {"tokens": made, "busy": busy, "seconds": time.process_time()}
    out.write(json.dumps(found) + "\n")
    out.flush()
