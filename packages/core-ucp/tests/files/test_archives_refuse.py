"""Damaged, hostile and foreign archives are one clear error, and nothing of them is run."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from core.errors import CheckpointError
from core_ucp.files.archives import holds_mapping, read_archive
from core_ucp.view.files import Files

TREE = {"w": torch.arange(6.0).view(2, 3), "n": {"lr": 0.1, "b": torch.ones(4, dtype=torch.int8)}}


def saved(tree: Any, **options: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(tree, buffer, **options)
    return buffer.getvalue()


def opened(folder: Path, content: bytes) -> Any:
    """Read a file with that content."""
    (folder / "file.pt").write_bytes(content)
    return read_archive(Files(folder), "file.pt")


def rewritten(
    content: bytes, changed: dict[str, bytes], compression: int = zipfile.ZIP_STORED
) -> bytes:
    """An archive with other entries; names without the folder."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as source,
        zipfile.ZipFile(buffer, "w", compression) as target,
    ):
        for entry in source.infolist():
            short = entry.filename.partition("/")[2]
            target.writestr(entry.filename, changed.get(short, source.read(entry)))
    return buffer.getvalue()


class Call:
    """Pickled as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, "posix.system"),
        (eval, "builtins.eval"),
        (getattr, "builtins.getattr"),
        (__import__, "builtins.__import__"),
        (torch.load, "torch.serialization.load"),
        (bytearray, "builtins.bytearray"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_calls(function: Any, name: str, protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    content = saved({"x": Call(function, f"touch {marker}")}, pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match=rf"blocked global {name} in .*file\.pt"):
        opened(tmp_path, content)
    assert not marker.exists()


def test_a_known_class_cannot_be_changed_for_others(tmp_path: Path) -> None:
    for name in ("ctorch._utils\n_rebuild_tensor_v2\n", "ccollections\nOrderedDict\n"):
        program = b"\x80\x02" + name.encode() + b"N}X\x06\x00\x00\x00ownersK\x01s\x86b."
        with pytest.raises(CheckpointError, match="is damaged"):
            opened(tmp_path, rewritten(saved(TREE), {"data.pkl": program}))
    assert not hasattr(torch._utils._rebuild_tensor_v2, "owners")


def test_a_tensor_without_a_storage(tmp_path: Path) -> None:
    program = b"\x80\x02ctorch\nTensor\n(J\xff\xff\xff\x7ftR."
    with pytest.raises(CheckpointError, match="without its storage"):
        opened(tmp_path, rewritten(saved(TREE), {"data.pkl": program}))


def test_files_before_zip_archives(tmp_path: Path) -> None:
    content = saved(TREE, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"file\.pt is no archive of torch\.save"):
        opened(tmp_path, content)
    assert not holds_mapping(tmp_path / "file.pt")
    assert not holds_mapping(tmp_path / "none")


def test_compressed_entries(tmp_path: Path) -> None:
    content = rewritten(saved(TREE), {}, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"file\.pt is packed"):
        opened(tmp_path, content)


def test_another_byte_order(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="byte order b'big'"):
        opened(tmp_path, rewritten(saved(TREE), {"byteorder": b"big"}))


def test_two_entries_of_one_name(tmp_path: Path) -> None:
    buffer = io.BytesIO(saved(TREE))
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(next(n for n in archive.namelist() if n.endswith("data/0")), bytes(24))
    with pytest.raises(CheckpointError, match="two entries named 'data/0'"):
        opened(tmp_path, buffer.getvalue())


def test_entries_that_overlap(tmp_path: Path) -> None:
    content = bytearray(saved({"a": torch.ones(100), "b": torch.ones(100)}))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        at = content.index(b"PK\x01\x02", archive.start_dir)
    target, victim = records["data/1"].header_offset, records["data/0"].header_offset
    while struct.unpack_from("<I", content, at + 42)[0] != target:
        at = content.index(b"PK\x01\x02", at + 4)
    struct.pack_into("<I", content, at + 42, victim)
    with pytest.raises(CheckpointError, match=r"file\.pt is damaged"):
        opened(tmp_path, bytes(content))


def test_storages_that_are_too_short(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"storage '0' has 8 bytes and not 24"):
        opened(tmp_path, rewritten(saved(TREE), {"data/0": bytes(8)}))


def _tensor(first: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A pickle of one tensor over the first storage of six numbers."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            kind = torch.FloatStorage
            return ("storage", kind, "0", "cpu", 6) if isinstance(value, Storage) else None

    buffer = io.BytesIO()
    rebuild = torch._utils._rebuild_tensor_v2
    Pickler(buffer, 2).dump(Call(rebuild, Storage(), first, shape, stride, False, {}))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("first", "shape", "stride"),
    [
        (1, (2, 3), (3, 1)),
        (0, (2, 3), (4, 1)),
        (-1, (2,), (1,)),
        (0, (-2,), (1,)),
        (0, (2,), (-1,)),
        (5, (2**62, 2**62), (0, 1)),
        (0, (2,), (1, 1)),
        (0, (1,) * 65, (1,) * 65),
    ],
)
def test_tensors_outside_of_their_storage(
    first: int, shape: tuple[int, ...], stride: tuple[int, ...], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"file\.pt is damaged"):
        opened(tmp_path, rewritten(saved(TREE), {"data.pkl": _tensor(first, shape, stride)}))


def test_deep_pickles_are_no_crash(tmp_path: Path) -> None:
    deep = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    with pytest.raises(CheckpointError, match="levels deep"):
        opened(tmp_path, rewritten(saved(TREE), {"data.pkl": deep}))


def doubled(times: int) -> bytes:
    """A pickle of lists that each hold the one before twice."""
    lists = [b"(lq\x00N\x61" + b"0"]
    lists += [
        b"(lq" + bytes([n]) + b"(" + 2 * (b"h" + bytes([n - 1])) + b"e0" for n in range(1, times)
    ]
    return b"\x80\x02" + b"".join(lists) + b"h" + bytes([times - 1]) + b"."


def test_a_pickle_that_multiplies_itself(tmp_path: Path) -> None:
    few = opened(tmp_path, rewritten(saved(TREE), {"data.pkl": doubled(3)}))
    assert few == [[[None], [None]], [[None], [None]]]
    with pytest.raises(CheckpointError, match="values on"):
        opened(tmp_path, rewritten(saved(TREE), {"data.pkl": doubled(60)}))


def test_a_pickle_that_holds_itself(tmp_path: Path) -> None:
    own = b"\x80\x02(lq\x00h\x00a."
    with pytest.raises(CheckpointError, match="holds itself"):
        opened(tmp_path, rewritten(saved(TREE), {"data.pkl": own}))


@pytest.mark.parametrize("field", ["stride", "first", "shape", "storage"])
def test_a_tensor_whose_numbers_are_set_after_they_were_checked(field: str, tmp_path: Path) -> None:
    class Later:
        def __reduce__(self) -> tuple[Any, ...]:
            call = torch.ones(4, 4).__reduce_ex__(2)
            return call[0], call[1], {field: (-1, 1)}

    with pytest.raises(CheckpointError, match="no object with a state"):
        opened(tmp_path, saved({"w": Later()}))


@pytest.mark.parametrize(
    ("shape", "stride"), [((2**32, 2**32), (0, 0)), ((0, 2**70), (1, 1)), ((1,), (2**62,))]
)
def test_sizes_that_no_table_can_hold(
    shape: tuple[int, ...], stride: tuple[int, ...], tmp_path: Path
) -> None:
    class Large:
        def __reduce__(self) -> tuple[Any, ...]:
            function, arguments = torch.ones(1).__reduce_ex__(2)[:2]
            return function, (*arguments[:2], shape, stride, *arguments[4:])

    with pytest.raises(CheckpointError, match="no count|with steps of"):
        opened(tmp_path, saved({"w": Large()}))


CONTENT = saved(TREE)


@given(end=st.integers(0, len(CONTENT) - 1))
@settings(max_examples=150, deadline=None)
def test_truncated_files(end: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(CheckpointError, match=r"file\.pt"):
        opened(tmp_path_factory.mktemp("cut"), CONTENT[:end])


@given(at=st.integers(0, len(CONTENT) - 1), bit=st.integers(0, 7))
@settings(max_examples=500, deadline=None)
def test_flipped_bits_never_move_a_tensor(
    at: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(CONTENT)
    content[at] ^= 1 << bit
    folder = tmp_path_factory.mktemp("flip")
    expected = opened(folder, CONTENT)
    with contextlib.suppress(CheckpointError):
        assert opened(folder, bytes(content)) == expected


def test_no_bit_of_the_header_of_a_storage_moves_it(tmp_path: Path) -> None:
    expected = opened(tmp_path, CONTENT)
    with zipfile.ZipFile(io.BytesIO(CONTENT)) as archive:
        begin = next(e.header_offset for e in archive.infolist() if e.filename.endswith("data/1"))
    refused = 0
    for at in range(begin, begin + 40):
        for bit in range(8):
            content = bytearray(CONTENT)
            content[at] ^= 1 << bit
            try:
                assert opened(tmp_path, bytes(content)) == expected
            except CheckpointError:
                refused += 1
    assert refused > 100
