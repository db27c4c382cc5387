"""llama.cpp as a reference from outside, in a process and an environment of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from core.errors import EngineError
from core_splitfuse.benchmarking.peers.child import Child, require
from core_splitfuse.benchmarking.peers.peer import MissingPeerError, Opened, Peer
from core_splitfuse.benchmarking.subject import Subject

SLOTS = 64
"""Requests at once."""


def llama_cpp(budget: int, python: str = sys.executable) -> Peer:
    """Batches of up to ``budget`` tokens, as llama.cpp's server makes them."""
    return Peer(f"llama.cpp {budget}", _opener(budget, python), once=True)


def _opener(budget: int, python: str) -> Callable[[Subject], Opened]:
    def open_child(subject: Subject) -> Opened:
        fix = "a virtual environment with `pip install llama-cpp-python gguf`"
        for package in ("llama_cpp", "gguf"):
            require(python, package, fix)
        with subject.saved() as folder:
            arguments: dict[str, object] = {
                "model": str(folder),
                "budget": budget,
                "longest": subject.longest,
                "slots": SLOTS,
                "threads": int(os.environ.get("OMP_NUM_THREADS", "1")),
            }
            try:
                child = Child(python, "serve_llama_cpp.py", arguments, {})
            except EngineError as error:
                raise MissingPeerError("llama.cpp does not start", why=error.why) from error
        return Opened(child, child.seconds)

    return open_child
