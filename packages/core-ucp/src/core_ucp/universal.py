"""The manifest of a universal folder: what stands beside its safetensors files.

The tensors lie in plain safetensors files under the keys of DCP, so that torch's own
``HuggingFaceStorageReader`` loads them; everything else is one JSON file. Universal Checkpointing
(arXiv 2406.18820) calls what is stored here atoms: whole tensors, free of any parallel layout.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Ge
from pydantic import TypeAdapter, ValidationError

from core.disk import disk_errors, sync_file
from core.errors import CheckpointError

NAME = "ucp.json"
MAJOR, MINOR = 1, 0
_CHECK = "blake2b"
_LARGEST = 2**30


@dataclass(frozen=True)
class StoredAtom:
    """One whole tensor: where it lies, what it is, and its digest."""

    file: str
    offset: Annotated[int, Ge(0)]
    shape: tuple[Annotated[int, Ge(0)], ...]
    dtype: str
    relation: str
    digest: str


@dataclass(frozen=True)
class StoredFile:
    """A file beside the manifest: its size, and the BLAKE2b of its first bytes, which are no atom."""

    size: Annotated[int, Ge(0)]
    head: Annotated[int, Ge(0)]
    blake2b: str


@dataclass(frozen=True)
class Manifest:
    """What a universal folder says of itself.

    Attributes:
        atoms: by key (:mod:`core_ucp.view.keys`).
        files: by name.
        aliases: parameter names that stand for the same tensor as another one.
        resume: encoded fields of :class:`core_ucp.view.view.Resume`.
        source: framework, folder, files with their sizes, mesh and details of what was converted.
        remarks: what the user was told when it was made.
        lossy: steps that cannot be undone, such as an average of replicas or rounding.
        written_by: name and version of the program.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    atoms: dict[str, StoredAtom]
    files: dict[str, StoredFile]
    aliases: dict[str, str] = field(default_factory=dict)
    resume: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    lossy: list[str] = field(default_factory=list)
    written_by: str = ""

    def write(self, folder: Path) -> None:
        """Write and sync it in ``folder``."""
        content: dict[str, Any] = {"format": "core-ucp", "version": [MAJOR, MINOR]}
        content |= asdict(self)
        text = json.dumps(content, indent=1).removesuffix("\n}").encode()
        with disk_errors(f"cannot write {folder / NAME}"):
            sync_file(folder / NAME, text + _ending(text))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read it from ``folder`` and make sure that it is as it was written.

        Raises:
            CheckpointError: when it is missing, damaged, or of a newer major version.
        """
        path = folder / NAME
        with disk_errors(f"cannot read {path}"):
            if path.stat().st_size > _LARGEST:
                raise CheckpointError(f"{path} is no manifest", why="it is too large")
            text = path.read_bytes()
        try:
            content: Any = json.loads(text)
            _require_version(path, content.pop("version"))
            del content["format"], content[_CHECK]
            # What comes before the check is what it covers, byte by byte.
            size = len(text) - len(_ending(b""))
            if text[size:] != _ending(text[:size]):
                raise ValueError("it is not as it was written")
            return _adapter().validate_python(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"{path} is damaged", why=f"{where}: {first['msg']}") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged", why=str(error)) from None


def head_digest(head: bytes) -> str:
    """BLAKE2b of the first bytes of a file."""
    return hashlib.blake2b(head, digest_size=16).hexdigest()


def _require_version(path: Path, version: Any) -> None:
    major, minor = (int(number) for number in version)
    if major > MAJOR:
        raise CheckpointError(
            f"{path} has version {major}.{minor}",
            why=f"this program knows {MAJOR}.x",
            fix="update core-ucp",
        )


def _ending(text: bytes) -> bytes:
    """The last lines of a manifest: the digest of all bytes before them."""
    return f',\n "{_CHECK}": "{head_digest(text)}"\n}}'.encode()


def _adapter() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)
