"""Checkpoints of Megatron-LM: ``torch_dist`` folders, and the older ``mp_rank`` files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import CheckpointError
from core_ucp.files.texts import read_note
from core_ucp.view.view import View

if TYPE_CHECKING:
    from core_ucp.layout.rules import Rules

LATEST = "latest_checkpointed_iteration.txt"


def detect(path: Path) -> bool:
    """Whether a folder is of Megatron: one iteration, or the folder above that names the last."""
    if not path.is_dir():
        return False
    dist = (path / ".metadata").is_file() and (path / "metadata.json").is_file()
    return dist or (path / LATEST).is_file() or any(path.glob("mp_rank_*/model_optim_rng.pt"))


def open_view(path: Path, rules: Rules | None = None) -> View:
    """Open a checkpoint of Megatron.

    Args:
        path: folder of an iteration, or the one above it.
        rules: layouts of the parameters of ``mp_rank`` files; those of Megatron's own GPT models
            unless given. Folders of ``torch_dist`` need none.

    Raises:
        CheckpointError: for a folder that is incomplete or of a form that cannot be converted.
    """
    folder = _iteration(path)
    if (folder / "metadata.json").is_file():
        from core_ucp.sources.megatron.torch_dist import open_view as open_folder

        return open_folder(folder, rules)
    from core_ucp.sources.megatron.legacy import open_view as open_ranks

    return open_ranks(folder, rules)


def _iteration(path: Path) -> Path:
    """The folder of the last iteration."""
    if not (path / LATEST).is_file():
        return path
    word = read_note(path / LATEST)
    if word != "release" and not re.fullmatch("[0-9]{1,18}", word):
        raise CheckpointError(f"{path / LATEST} is damaged", why=f"it says {word[:40]!r}")
    folder = path / (word if word == "release" else f"iter_{int(word):07}")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing", why=f"{LATEST} names it")
    return folder
