"""What the checkpoints of one run share: memory, a writer process, and the plan of the last one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from core_fastpersist.dcp.balance import BalancedSavePlanner
from core_fastpersist.dcp.staging import Staging
from core_fastpersist.direct.newfile import WriteOptions
from core_fastpersist.settings import FastPersistSettings

if TYPE_CHECKING:
    from core import Run


@dataclass(frozen=True)
class Session:
    """What is kept between the checkpoints of a run.

    Attributes:
        staging: copies tensors, and carries files.
        planner: plans which rank writes what; one save at a time.
    """

    staging: Staging
    planner: BalancedSavePlanner


_open: WeakKeyDictionary[Run, Session] = WeakKeyDictionary()


def session_of(run: Run) -> Session:
    """The session of a run, made as the section ``[fastpersist]`` says when it is first needed."""
    if run not in _open:
        wanted = run.settings(FastPersistSettings)
        staging = Staging(
            mode=wanted.mode,
            writer=wanted.writer,
            memory=int(wanted.memory * 2**30) or None,
            audits=wanted.audits,
            options=options(wanted),
        )
        _open[run] = Session(staging, BalancedSavePlanner(wanted.writers))
    return _open[run]


def close(run: Run) -> None:
    """End what :func:`session_of` began for a run."""
    session = _open.pop(run, None)
    if session is not None:
        session.staging.close()


def options(wanted: FastPersistSettings) -> WriteOptions:
    """How files are written by the settings."""
    chunk = 1 << (wanted.chunk * 2**20 - 1).bit_length()
    return WriteOptions(chunk=chunk, threads=wanted.threads)
