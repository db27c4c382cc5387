"""DCP's ``.metadata``: a pickle, read with a closed list of classes that it cannot change."""

from __future__ import annotations

import enum
import io
import pickle
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import Metadata

from core.disk import disk_errors
from core.errors import CheckpointError

METADATA = ".metadata"
_LARGEST = 2**31
_CLASSES: Mapping[str, set[str]] = {
    dcp_metadata.__name__: {*dcp_metadata.__all__, "_MEM_FORMAT_ENCODING"},
    filesystem.__name__: {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}
_NONE = object()


class MetadataUnpickler(pickle.Unpickler):
    """Reads DCP metadata and allows the classes that it is made of, no others.

    A pickle can also set attributes of a class that it names, such as the methods of a path. They
    are set back after reading, and the file is refused.

    Args:
        content: the pickle.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self._named: dict[int, tuple[Any, dict[str, Any]]] = {}

    def allowed(self, module: str, name: str) -> Any:
        """The class of a name, or ``None`` for one that metadata is not made of."""
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        kind = getattr(torch, name, None) if module == "torch" else None
        return kind if isinstance(kind, torch.dtype) else None

    def find_class(self, module: str, name: str) -> Any:
        found = self.allowed(module, name)
        if found is None:
            raise CheckpointError(
                "the checkpoint's metadata was refused",
                why=f"it wants to run {module}.{name}",
                fix="do not load this checkpoint with other tools either, unless you trust it",
            )
        if isinstance(found, FunctionType):
            return partial(found)  # attributes are set on this one, and nobody else has it
        members = list[Any](found) if isinstance(found, enum.EnumMeta) else []
        for each in (found, *members):
            if hasattr(each, "__dict__"):
                self._named.setdefault(id(each), (each, dict(vars(each))))
        return found

    def load(self) -> Any:
        """The content.

        Raises:
            CheckpointError: for a class that is not allowed, or that was changed.
        """
        try:
            found = super().load()
        finally:
            changed = [each for each, before in self._named.values() if _set_back(each, before)]
        if changed:
            raise CheckpointError(
                "the checkpoint's metadata was refused", why=f"it wants to change {changed[0]!r}"
            )
        return found


def _set_back(each: Any, before: Mapping[str, Any]) -> bool:
    """Give a class, or a member of one, the attributes that it had; tell whether it had others."""
    now = dict(vars(each))
    # Enumerations let nobody set or remove their members through themselves.
    kind: Any = type if isinstance(each, type) else type(each)
    changed = [n for n in {*now, *before} if now.get(n, _NONE) is not before.get(n, _NONE)]
    for name in changed:
        if name in before:
            kind.__setattr__(each, name, before[name])
        else:
            kind.__delattr__(each, name)
    return bool(changed)


def read_metadata(folder: Path, unpickler: type[MetadataUnpickler] = MetadataUnpickler) -> Metadata:
    """Read the metadata of a DCP folder.

    Args:
        folder: with ``.metadata``.
        unpickler: that allows the classes of a dialect as well.

    Raises:
        CheckpointError: when it is damaged, or wants to run code, naming what.
    """
    path = folder / METADATA
    with disk_errors(f"cannot read {path}"):
        if path.stat().st_size > _LARGEST:
            raise CheckpointError(f"{path} is no DCP metadata", why="it is too large")
        content = path.read_bytes()
    try:
        found = unpickler(content).load()
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged pickle makes of the parser
        raise CheckpointError(f"{path} is damaged", why=str(error)) from None
    if not isinstance(found, Metadata):
        raise CheckpointError(f"{path} is damaged", why="it holds no DCP metadata")
    return found
