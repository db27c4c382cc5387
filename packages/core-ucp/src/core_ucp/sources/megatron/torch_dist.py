"""Folders of Megatron-core's ``torch_dist`` format: DCP, beside a file of what all ranks share.

Tensors are whole and carry Megatron's own keys: layers are stacked along a first axis (or stand
alone), the halves of a gated unit follow each other, and the rows of a fused qkv are grouped by
query group. Lenses bring them into the form of other frameworks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import CheckpointError
from core_ucp.files.distcp import Stored, read_stored
from core_ucp.files.metadata import METADATA
from core_ucp.files.texts import read_json
from core_ucp.sources.megatron.common import Common, read_common
from core_ucp.sources.megatron.flattened import original_shapes, restored
from core_ucp.sources.megatron.weights import Weights
from core_ucp.view.files import Files
from core_ucp.view.view import Atom, View

if TYPE_CHECKING:
    from core_ucp.layout.rules import Rules

CONFIG, COMMON = "metadata.json", "common.pt"
_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(?P<state>[^.]+)\.(?P<name>.+)")
_BUCKET = re.compile(r"(?:chained_\d+\.)?optimizer\.distributed\.dp_group_idx_\d+\.gbuf_idx")


def open_view(path: Path, rules: Rules | None = None) -> View:
    """Open a folder of one iteration.

    Args:
        path: folder with ``metadata.json``.
        rules: not needed, the tensors describe themselves.

    Raises:
        CheckpointError: for another backend, an optimizer that only Megatron can put together,
            elements that no file holds, and files that are damaged or want to run code.
    """
    _require_backend(path)
    files = Files(path)
    stored = read_stored(path, files)
    common = read_common(files, COMMON) if (path / COMMON).is_file() else Common()
    found = Weights(files, common)
    for key, atom in _tensors(stored).items():
        match = _STATE.fullmatch(key)
        if match:
            found.state(match["name"], match["state"], atom)
        elif key.startswith("optimizer."):
            found.extra(key, atom)
        else:
            found.weight(key, atom)
    objects = {key.partition("/")[0] for key in stored.objects}
    if objects:
        words = ", ".join(sorted(objects)[:5])
        found.remarks.append(f"{len(objects)} kinds of objects are left out: {words}")
    return found.view(path, {"backend": "torch_dist", "files": len(files)})


def _require_backend(path: Path) -> None:
    config: Any = read_json(path / CONFIG)
    backend = config.get("sharded_backend") if isinstance(config, Mapping) else None
    if backend != "torch_dist" or not (path / METADATA).is_file():
        raise CheckpointError(
            f"{path} is of Megatron's backend {backend!r}",
            why="only torch_dist is read",
            fix="load it with Megatron and save it with --ckpt-format torch_dist",
        )


def _tensors(stored: Stored) -> dict[str, Atom]:
    """All tensors in their own shapes.

    Raises:
        CheckpointError: for an optimizer in the form of Megatron's buffers.
    """
    bucket = next((key for key in stored.tensors if _BUCKET.match(key)), None)
    if bucket is not None:
        raise CheckpointError(
            f"{stored.files.folder} holds the optimizer in the form of Megatron's buffers",
            why=f"{bucket} is a buffer of many parameters, and nothing says which are where",
            fix="load it with Megatron and save it with --dist-ckpt-optim-fully-reshardable",
        )
    flat: Mapping[str, tuple[int, ...]] = original_shapes(stored.metadata)
    return {
        key: restored(key, atom, flat[key]) if key in flat else atom
        for key, atom in stored.tensors.items()
    }
