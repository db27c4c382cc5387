"""Loading one file: parallel direct reads, every digest checked, no pickle unless it is trusted."""

from __future__ import annotations

import io
import mmap as mapping
import pickle
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.checkpoints.save import root_cause
from core.disk import disk_errors
from core.errors import CheckpointError
from core_fastpersist.direct.digests import Digests
from core_fastpersist.direct.memory import pages
from core_fastpersist.direct.reading import check_file, read_file
from core_fastpersist.files.filling import Live, fill
from core_fastpersist.files.header import ALIGNMENT, READABLE, Entry, Header
from core_fastpersist.files.parsing import read_header
from core_fastpersist.files.restoring import Restorer
from core_fastpersist.files.scalars import Encoded
from core_fastpersist.files.sources import row_major_bytes
from core_fastpersist.files.storing import PT_SUFFIXES
from core_fastpersist.files.tree import Decoder, Encoder

_REPLACED = 100
"""Times that a file may be replaced while it is loaded."""
_ZIP = b"PK\x03\x04"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file.

    Args:
        name: its name.
        dtype: what the format calls its dtype.
        shape: elements in every dimension.
        begin: first byte in the file.
        end: byte after its last.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class FileInfo:
    """What a safetensors file says of itself.

    Args:
        path: the file.
        size: its bytes.
        start: first byte of the data.
        alignment: largest power of two, 4096 at most, that ``start`` is a multiple of.
        ours: whether this package wrote it.
        tensors: in the order of their bytes.
        metadata: the strings of the header, as they stand there.
        tree: the Python tree as JSON; ``None`` in a file of another program.
        digests: digests of the data; ``None`` in a file of another program.
    """

    path: Path
    size: int
    start: int
    alignment: int
    ours: bool
    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    tree: Any
    digests: Digests | None


def inspect_file(path: str | Path) -> FileInfo:
    """Read what the header of a safetensors file says; the data are not read.

    Raises:
        CheckpointError: when it is damaged, unfinished, or no such file.
    """
    path = Path(path)
    header = read_header(path)
    start = header.start
    tensors = tuple(
        TensorInfo(e.name, e.dtype, e.shape, start + e.begin, start + e.end) for e in header.entries
    )
    return FileInfo(
        path=path,
        size=header.size,
        start=start,
        alignment=min(ALIGNMENT, start & -start),
        ours=header.ours,
        tensors=tensors,
        metadata=dict(header.metadata),
        tree=header.tree["root"] if header.tree else None,
        digests=header.digests,
    )


def load(
    path: str | Path,
    *,
    map_location: str | torch.device = "cpu",
    into: Any = None,
    verify: bool = True,
    mmap: bool = False,
    trust_pickles: bool = False,
) -> Any:
    """Load what :func:`~core_fastpersist.save` has saved, or a safetensors file of any program.

    Args:
        path: the file. One of another program gives a dict of its tensors.
        map_location: where the tensors go.
        into: a tree of the saved structure, whose tensors and arrays are filled in place and stand
            in the result. They are filled in part when the call fails.
        verify: whether the data are held against the digests, where the file has them. The header
            always is.
        mmap: whether tensors stay in the file until they are used; what is written to them is not
            written to the file. ``verify`` reads the whole file all the same.
        trust_pickles: whether pickles may run code. Without it, those that hold more than tensors
            and plain values are refused.

    Raises:
        CheckpointError: for a file that is damaged, unfinished, of another kind, or that does not fit
            ``into``: which file, and what is wrong with it.
    """
    path = Path(path)
    device = torch.device(map_location)
    if into is not None and (mmap or device.type != "cpu"):
        raise CheckpointError("`into` says where the tensors go", fix="drop mmap and map_location")

    def once() -> Any:
        with _errors(path), torch.no_grad():
            if _is_pt(path):
                return _load_pt(path, device, into, mmap, trust_pickles)
            header = read_header(path)
            if into is not None:
                return _load_into(path, header, into, verify, trust_pickles)
            data = _map(path, header, verify) if mmap else _read(path, header, verify)
            return _tree(path, header, _tensors(header, data, device), trust_pickles)

    return _of_one_file(path, once)


def _of_one_file(path: Path, load: Callable[[], Any]) -> Any:
    """Load again where a save has replaced the file meanwhile: header and data would be of two."""
    for _ in range(_REPLACED):
        before = _identity(path)
        try:
            found = load()
        except CheckpointError:
            if _identity(path) == before:
                raise
        else:
            if _identity(path) == before:
                return found
    return load()


def _identity(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_ctime_ns, found.st_size


def _read(path: Path, header: Header, verify: bool) -> memoryview:
    """All bytes of the data, congruent with their place in the file."""
    lead = header.start % ALIGNMENT
    memory = pages(lead + header.size - header.start)
    digests = header.digests if verify else None
    read_file(path, memory[lead:], offset=header.start, digests=digests)
    return memory[lead:]


def _map(path: Path, header: Header, verify: bool) -> memoryview:
    if verify and header.digests is not None:
        check_file(path, header.digests)
    with disk_errors(f"cannot map {path}"), path.open("rb") as file:
        return memoryview(mapping.mmap(file.fileno(), header.size, access=mapping.ACCESS_COPY))[
            header.start :
        ]


def _tensors(header: Header, data: memoryview, device: torch.device) -> Callable[[str], Tensor]:
    """Gives the bytes of a stored tensor, each as a storage of its own."""
    entries = {entry.name: entry for entry in header.entries}

    @cache
    def give(name: str) -> Tensor:
        entry = entries[name]
        if entry.nbytes == 0:
            return torch.empty(0, dtype=torch.uint8, device=device)
        found = torch.frombuffer(data, dtype=torch.uint8, offset=entry.begin, count=entry.nbytes)
        if found.data_ptr() % READABLE[entry.dtype].itemsize:
            found = found.clone()
        return found.to(device)

    return give


def _root(header: Header) -> Encoded:
    """The encoded tree; of a file of another program a dict of its tensors."""
    if header.tree:
        return header.tree["root"]
    return {"dict": {entry.name: {"tensor": entry.name} for entry in header.entries}}


def _tree(path: Path, header: Header, data: Callable[[str], Tensor], trust: bool) -> Any:
    restorer = Restorer({entry.name: entry for entry in header.entries}, data)
    objects = _Pickles(path, header, data, trust)
    return Decoder(restorer.leaf, objects.get).decode(_root(header))


def _load_into(path: Path, header: Header, into: Any, verify: bool, trust: bool) -> Any:
    root = _root(header)
    live = Live(root, into, {entry.name: entry for entry in header.entries})
    data = live.fill(lambda targets: fill(path, header, targets, verify=verify))
    return Decoder(live.leaf, _Pickles(path, header, data, trust).get).decode(root)


def _load_pt(path: Path, device: torch.device, into: Any, mmap: bool, trust: bool) -> Any:
    try:
        found = torch.load(
            path, map_location=device, weights_only=not trust, mmap=mmap or into is not None
        )
    except pickle.UnpicklingError as error:
        raise _untrusted(path, error, trust) from None
    if into is None:
        return found
    encoder = Encoder(pickling=True)
    root = encoder.encode(found)
    stored = {tensor.name: tensor for tensor in encoder.leaves.finish()}
    entries = {t.name: Entry(t.name, t.dtype, t.shape, 0, t.nbytes) for t in stored.values()}

    def read(targets: Mapping[str, Tensor]) -> None:
        for name, tensor in stored.items():
            targets[name][: tensor.data.nbytes].copy_(row_major_bytes(tensor.data))

    live = Live(root, into, entries)
    live.fill(read)
    return Decoder(live.leaf, encoder.pickled.__getitem__).decode(root)


class _Pickles:
    """The objects of a file that only a pickle can hold, read when the first is asked for."""

    def __init__(
        self, path: Path, header: Header, data: Callable[[str], Tensor], trust: bool
    ) -> None:
        self._path = path
        self._header = header
        self._data = data
        self._trust = trust
        self._objects: list[Any] | None = None

    def get(self, number: int) -> Any:
        if self._objects is None:
            self._objects = self._load(self._header.tree["pickles"])
        return self._objects[number]

    def _load(self, name: str) -> list[Any]:
        blob = io.BytesIO(self._data(name).cpu().numpy().data)
        try:
            found = torch.load(blob, weights_only=not self._trust)
        except pickle.UnpicklingError as error:
            raise _untrusted(self._path, error, self._trust) from None
        if not isinstance(found, list):
            raise TypeError("its pickle is no list")
        return found


def _untrusted(path: Path, error: pickle.UnpicklingError, trusted: bool) -> CheckpointError:
    if trusted:
        return CheckpointError(f"{path} has a damaged pickle", why=str(error))
    return CheckpointError(
        f"{path} has objects that only code can rebuild",
        why=str(error).partition("Please file an issue")[0].splitlines()[-1].strip(),
        fix="load(..., trust_pickles=True), if you trust whoever wrote it: it runs their code",
    )


def _is_pt(path: Path) -> bool:
    with path.open("rb") as file:
        return path.suffix in PT_SUFFIXES or file.read(len(_ZIP)) == _ZIP


@contextmanager
def _errors(path: Path) -> Generator[None]:
    """Whatever goes wrong becomes one error that names the file."""
    try:
        with disk_errors(f"cannot read {path}"):
            yield
    except CheckpointError as error:
        if str(path) in error.what:
            raise
        raise CheckpointError(f"{path}: {error.what}", why=error.why, fix=error.fix) from error
    except RecursionError:
        raise CheckpointError(f"cannot load {path}", why="its tree nests too deep") from None
    except Exception as error:
        # Bytes of any origin can make torch, pickle and the decoder raise almost anything.
        raise CheckpointError(f"cannot load {path}", why=root_cause(error)) from error
