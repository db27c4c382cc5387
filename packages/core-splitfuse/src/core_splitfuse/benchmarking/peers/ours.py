"""This package's engine, and the same code without splitting."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from core_splitfuse.benchmarking.peers.peer import Opened, Peer
from core_splitfuse.benchmarking.subject import Subject
from core_splitfuse.settings import SplitFuseSettings

PREFILL_BUDGET = 2048
"""Prompt tokens that engines without splitting take at once; a longer prompt goes alone."""


def splitfuse(settings: SplitFuseSettings, name: str = "") -> Peer:
    """The engine with these settings."""
    return Peer(name or f"splitfuse {settings.budget}", _opener(settings))


def prefill_first(settings: SplitFuseSettings) -> Peer:
    """The same engine and settings, but whole prompts before any decode."""
    whole = replace(settings, mode="prefill_first", budget=PREFILL_BUDGET, latency=0.0)
    return Peer("prefill first", _opener(whole))


def _opener(settings: SplitFuseSettings) -> Callable[[Subject], Opened]:
    def open_engine(subject: Subject) -> Opened:
        from core_splitfuse.engine.engine import Engine

        on_cpu = subject.device == "cpu"
        seconds = time.process_time if on_cpu else time.perf_counter
        return Opened(Engine(subject.build(), settings), seconds)

    return open_engine
