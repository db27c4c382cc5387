"""Files laid out before their bytes are there: torch reads them, and so does every zip program."""

from __future__ import annotations

import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from core.errors import CheckpointError
from core_ucp.files.new_archives import Archive, new_archive
from core_ucp.files.new_pickles import Call, Instance, Reference, Room, encode

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn,
    torch.uint16, torch.uint32,
]  # fmt: skip


@st.composite
def rooms(draw: Any) -> Room:
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    return Room(draw(st.sampled_from(DTYPES)), tuple(shape))


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
)
trees = st.recursive(
    scalars | rooms(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3).map(OrderedDict)
    ),
    max_leaves=12,
)


def make(folder: Path, archive: Archive, seal: bool = True) -> dict[Room, bytes]:
    """Write a file and random bytes into its tensors."""
    path = folder / archive.file.name
    content = bytearray(archive.file.size)
    for offset, part in archive.file.parts:
        content[offset : offset + len(part)] = part
    given = {room: os.urandom(room.nbytes) for room in archive.places}
    for room, offset in archive.places.items():
        assert offset % 64 == 0
        bits = bytes(b & 1 for b in given[room]) if room.dtype == torch.bool else given[room]
        given[room] = bits
        content[offset : offset + room.nbytes] = bits
    path.write_bytes(content)
    if seal:
        archive.seal(path)
    return given


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def require_equal(loaded: Any, tree: Any, given: dict[Room, bytes]) -> None:
    if isinstance(tree, Room):
        assert (loaded.dtype, tuple(loaded.shape)) == (tree.dtype, tree.shape)
        assert loaded.is_contiguous()
        assert bits(loaded) == given[tree]
        return
    assert type(loaded) is type(tree)
    if isinstance(tree, dict):
        assert list(loaded) == list(tree)
        for key in tree:
            require_equal(loaded[key], tree[key], given)
    elif isinstance(tree, list | tuple):
        assert len(loaded) == len(tree)
        for item, expected in zip(loaded, tree, strict=True):
            require_equal(item, expected, given)
    else:
        assert loaded == tree


@settings(deadline=None)
@given(tree=trees, mmap=st.booleans())
def test_torch_loads_any_tree_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, tree: Any, mmap: bool
) -> None:
    folder = tmp_path_factory.mktemp("tree")
    given = make(folder, new_archive("tree.pt", tree))
    loaded = torch.load(folder / "tree.pt", mmap=mmap, weights_only=True)
    require_equal(loaded, tree, given)
    with zipfile.ZipFile(folder / "tree.pt") as archive:
        assert archive.testzip() is None


def test_checksums_are_wrong_until_the_file_is_sealed(tmp_path: Path) -> None:
    archive = new_archive("a.pt", [Room(torch.float32, (3, 5))])
    make(tmp_path, archive, seal=False)
    with zipfile.ZipFile(tmp_path / "a.pt") as opened:
        assert opened.testzip() == "archive/data/0"


def test_one_room_at_two_places_is_one_tensor(tmp_path: Path) -> None:
    room = Room(torch.float32, (4,))
    archive = new_archive("tied.pt", {"head": room, "embed": room})
    assert len(archive.places) == 1
    make(tmp_path, archive)
    loaded = torch.load(tmp_path / "tied.pt", weights_only=True)
    assert loaded["head"].data_ptr() == loaded["embed"].data_ptr()


def test_known_tensors_dtypes_and_sizes_are_kept(tmp_path: Path) -> None:
    tree = {
        "step": torch.tensor(7.0),
        "turned": torch.arange(6).view(2, 3).T,
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        "known": encode({"a": [1, 2.5, "ü"]}),
    }
    make(tmp_path, new_archive("known.pt", tree))
    loaded = torch.load(tmp_path / "known.pt", weights_only=True)
    assert torch.equal(loaded["step"], tree["step"])
    assert torch.equal(loaded["turned"], tree["turned"])
    assert loaded["dtype"] is torch.bfloat16
    assert loaded["size"] == torch.Size([2, 3])
    assert loaded["known"] == {"a": [1, 2.5, "ü"]}


def test_classes_are_named_without_being_imported(tmp_path: Path) -> None:
    tree = [
        Call(Reference("fractions", "Fraction"), (3, 4)),
        Instance(Reference("types", "SimpleNamespace"), {"start": 5}),
    ]
    make(tmp_path, new_archive("objects.pt", tree))
    fraction, space = torch.load(tmp_path / "objects.pt", weights_only=False)
    assert (fraction.numerator, fraction.denominator) == (3, 4)
    assert space.start == 5
    foreign = new_archive("foreign.pt", Instance(Reference("no.such.module", "Thing"), {}))
    make(tmp_path, foreign)
    with pytest.raises(Exception, match=r"no\.such|Unsupported|GLOBAL"):
        torch.load(tmp_path / "foreign.pt", weights_only=True)


def test_what_cannot_be_pickled_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"client\.seen\.0 is a set"):
        new_archive("a.pt", {"client": {"seen": [{1, 2}]}})
    with pytest.raises(CheckpointError, match="too large"):
        new_archive("a.pt", 2**3000)
    with pytest.raises(CheckpointError, match="beforehand"):
        encode(Room(torch.float32, ()))


def test_files_and_entries_beyond_four_gigabytes_are_found(tmp_path: Path) -> None:
    first, large, last = (Room(torch.uint8, (n,)) for n in (3, 2**32 + 5, 7))
    archive = new_archive("large.pt", {"first": first, "large": large, "last": last})
    path = tmp_path / "large.pt"
    with path.open("wb") as file:
        file.truncate(archive.file.size)
        for offset, part in archive.file.parts:
            file.seek(offset)
            file.write(part)
        file.seek(archive.places[large] + 2**32)
        file.write(b"large")
        file.seek(archive.places[last])
        file.write(b"last...")
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert loaded["large"].shape == (2**32 + 5,)
    assert bits(loaded["large"][2**32 :]) == b"large"
    assert bits(loaded["last"]) == b"last..."
    with zipfile.ZipFile(path) as opened:
        assert opened.getinfo("archive/data/1").file_size == 2**32 + 5
        assert opened.getinfo("archive/data/2").header_offset > 2**32


@pytest.mark.slow
def test_more_entries_than_a_plain_zip_can_count(tmp_path: Path) -> None:
    tree = [Room(torch.int16, (1,)) for _ in range(66_000)]
    given = make(tmp_path, new_archive("many.pt", tree))
    loaded = torch.load(tmp_path / "many.pt", weights_only=True, mmap=True)
    assert len(loaded) == 66_000
    assert bits(loaded[-1]) == given[tree[-1]]
    with zipfile.ZipFile(tmp_path / "many.pt") as archive:
        assert len(archive.namelist()) == 66_003


def test_a_truncated_file_is_not_sealed(tmp_path: Path) -> None:
    archive = new_archive("a.pt", [Room(torch.float32, (1000,))])
    make(tmp_path, archive, seal=False)
    os.truncate(tmp_path / "a.pt", 1000)
    with pytest.raises(CheckpointError, match="truncated"):
        archive.seal(tmp_path / "a.pt")
