"""Text to train on: the sources of the standard library, or files of the user."""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from core.errors import DataError

STDLIB = "stdlib"
_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".jsonl"})
_NOT_LIBRARY = frozenset(
    {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings"}
    | {"turtledemo", "pydoc_data", "__pycache__"}
)


def documents(sources: Sequence[str], seed: int) -> list[str]:
    """Read all documents of ``sources`` in an order that depends only on names and ``seed``.

    Args:
        sources: files, folders, or ``stdlib``.
        seed: seed of the shuffle.

    Raises:
        DataError: for a path that does not exist, cannot be read, or holds no text.
    """
    files = [file for source in sources for file in _files(source)]
    random.Random(seed).shuffle(files)
    texts = [text for file in files for text in _read(file) if text.strip()]
    if len(texts) == 1:
        texts = _paragraphs(texts[0])
    if len(texts) < 2:
        raise DataError(f"{', '.join(sources)}: too little text", why="two documents are needed")
    return texts


def split(texts: Sequence[str], held_out: float) -> tuple[list[str], list[str]]:
    """Split documents into training and held-out ones, evenly spread and at least one each."""
    chosen = {int(index / held_out) for index in range(max(1, int(len(texts) * held_out)))}
    held = [text for index, text in enumerate(texts) if index in chosen]
    return [text for index, text in enumerate(texts) if index not in chosen], held


def cut(texts: Iterable[str], limit: int) -> list[str]:
    """Take documents until they have ``limit`` characters; 0 takes all."""
    taken: list[str] = []
    total = 0
    for text in texts:
        if limit and total >= limit:
            break
        taken.append(text)
        total += len(text)
    return taken


def _files(source: str) -> list[Path]:
    if source == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        found = sorted(p for p in root.rglob("*.py") if _is_library(p.relative_to(root)))
    else:
        root = Path(source).expanduser()
        if not root.exists():
            raise DataError(f"{root} does not exist", fix="name a file or a folder in train.text")
        inside = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
        found = [p for p in inside if p.suffix in _SUFFIXES or p == root]
    if not found:
        kinds = ", ".join(sorted(_SUFFIXES))
        raise DataError(f"{root} holds no text", why=f"known files: {kinds}")
    return found


def _is_library(path: Path) -> bool:
    return not _NOT_LIBRARY & set(path.parts)


def _read(file: Path) -> Iterator[str]:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"cannot read {file}", why=error.strerror or str(error)) from None
    if file.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _json_text(file, number, line)


def _json_text(file: Path, number: int, line: str) -> str:
    try:
        return str(json.loads(line)["text"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}, line {number} is no document",
            why=f"{type(error).__name__}: {error}",
            fix='each line is an object with a "text" field',
        ) from None


def _paragraphs(text: str) -> list[str]:
    """Cut a single document at blank lines into some twenty parts, so that one can be held out."""
    parts = text.split("\n\n")
    size = max(1, len(parts) // 20)
    return ["\n\n".join(parts[i : i + size]) for i in range(0, len(parts), size)]
