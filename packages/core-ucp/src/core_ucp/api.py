"""What commands do, as plain functions."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from core import start
from core.checkpoints.convert import execute, plan
from core.contributions import Converter
from core.distributed import Ranks
from core_ucp.layout.rules import Rules
from core_ucp.layout.toml import load


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str,
    kind: str = "auto",
    rules: str | os.PathLike[str] = "",
    **settings: Any,
) -> Converter:
    """Convert a checkpoint into a new folder, as ``core convert`` does it, in this process alone.

    Example::

        convert("global_step100", "out", to="deepspeed", stage=3, world_size=8)

    Args:
        source: file or folder; it is only read.
        target: folder that appears when it is complete.
        to: name of the format that is made.
        kind: name of the source's format; ``auto`` finds it by looking.
        rules: file, or name of rules of a plugin, where files do not say how parameters lie.
        settings: of the section ``[ucp]``.

    Returns:
        what was done: tensors, bytes, what is left out, and remarks.

    Raises:
        CheckpointError: when the source is damaged or cannot be brought into that form.
        PluginError: for an unknown format.
        SettingsError: for a wrong setting.
    """
    heeded = {"rules": str(rules)} if rules else {}
    with (
        tempfile.TemporaryDirectory(prefix="core-ucp-") as folder,
        start(folder=folder, quiet=True, ranks=Ranks(), ucp=settings, checkpoint=heeded) as run,
    ):
        made = plan(Path(source), Path(target), to, run, from_format=kind)
        execute(made)
    return made.work


def load_rules(path: str | os.PathLike[str]) -> Rules:
    """The rules of a TOML or JSON file.

    Raises:
        CheckpointError: naming file, key, value, and what is allowed.
    """
    return load(Path(path))
