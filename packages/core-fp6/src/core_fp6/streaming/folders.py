"""Two folders: which may be source and target of a conversion, and what is copied along."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.disk import disk_errors
from core.errors import CheckpointError
from core.storage import require_free
from core_fp6.streaming.source import CONFIG, INDEX

if TYPE_CHECKING:
    from core_fp6.streaming.source import Source

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
"""Endings of files that hold weights; those that are not read are not passed on either."""
_TEMPLATES = "additional_chat_templates"
"""The only folder of a tokenizer."""


def require_apart(source: Path, target: Path) -> None:
    """Refuse a target that is taken, or that lies in the source or around it.

    Raises:
        CheckpointError: naming both.
    """
    inner, outer = target.resolve(), source.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        why = "a source is never changed"
        raise CheckpointError(
            f"{source} and {target} overlap", why=why, fix="choose another target"
        )
    require_free(target)


def copy_others(source: Source, folder: Path) -> None:
    """Copy what lies beside configuration and weights: tokenizer, generation settings, licence.

    Raises:
        CheckpointError: when the disk refuses.
    """
    for path in sorted(source.path.iterdir()):
        with disk_errors(f"cannot copy {path}"):
            if path.is_dir() and path.name == _TEMPLATES:
                shutil.copytree(path, folder / path.name)
            elif path.is_file() and not _is_own(path.name):
                shutil.copyfile(path, folder / path.name)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write ``config.json``.

    Raises:
        CheckpointError: when the disk refuses.
    """
    with disk_errors(f"cannot write {folder / CONFIG}"):
        text = json.dumps(config, indent=2, sort_keys=True)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def _is_own(name: str) -> bool:
    """Whether a file is written anew, or is no business of the new folder."""
    return name in (CONFIG, INDEX) or name.endswith((*_WEIGHTS, ".bin.index.json"))
