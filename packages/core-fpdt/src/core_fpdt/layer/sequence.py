"""The sequence that a model is being run on, where several ranks share it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

DOCUMENTS = "fpdt_documents"
"""Name in a batch of (B, S) ids of the documents of the whole sequence; -1 is padding."""

_documents: ContextVar[Tensor | None] = ContextVar("core_fpdt_documents", default=None)


def documents_in_force() -> Tensor | None:
    """The ids of the sequence in force, if ranks share it."""
    return _documents.get()


@contextmanager
def sequence_in_force(documents: Tensor | None) -> Generator[None]:
    """Put a shared sequence in force for the model that is called inside the ``with`` block."""
    token = _documents.set(documents)
    try:
        yield
    finally:
        _documents.reset(token)
