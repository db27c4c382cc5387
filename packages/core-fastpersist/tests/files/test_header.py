"""Headers: what is written is read, by us and by others, and what is damaged or hostile is refused."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from core.errors import CheckpointError
from core_fastpersist.direct.digests import Digests, cells, digest
from core_fastpersist.files.header import Entry, draft
from core_fastpersist.files.loading import inspect_file, load
from core_fastpersist.files.parsing import read_header
from core_fastpersist.files.storing import save

SIZES = {"F64": 8, "F32": 4, "BF16": 2, "U8": 1, "BOOL": 1}
quick = settings(max_examples=150, deadline=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headers")


def json_file(path: Path, header: Any, data: int = 0, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    count = len(text) if length is None else length
    path.write_bytes(count.to_bytes(8, "little") + text + bytes(data))
    return path


def own_file(path: Path, entries: list[Entry], tree: Any, chunk: int = 512, **kwargs: Any) -> Path:
    plan = draft(entries, tree, chunk=chunk, **kwargs)
    grid = cells(plan.start, chunk, plan.size)
    hashes = tuple(digest(bytes(end - begin)) for begin, end in grid)
    block = plan.block(Digests(plan.start, chunk, plan.size, hashes))
    assert len(block) == plan.start
    path.write_bytes(block + bytes(plan.size - plan.start))
    return path


@st.composite
def entry_lists(make: Callable[..., Any]) -> list[Entry]:
    names = make(st.lists(st.text(max_size=12), unique=True, max_size=6))
    found, end = [], 0
    for name in names:
        assume(name != "__metadata__")
        dtype = make(st.sampled_from(sorted(SIZES)))
        shape = tuple(make(st.lists(st.integers(0, 5), max_size=3)))
        size = math.prod(shape) * SIZES[dtype]
        found.append(Entry(name, dtype, shape, end, end + size))
        end += size
    return found


@quick
@given(
    entries=entry_lists(),
    tree=st.text(),
    residue=st.integers(0, 511).map(lambda n: n * 8),
    chunk=st.sampled_from([512, 4096, 2**24]),
)
def test_what_is_written_is_read_by_us_and_by_the_stock_reader(
    folder: Path, entries: list[Entry], tree: str, residue: int, chunk: int
) -> None:
    content = {"root": tree, "pickles": None}
    path = own_file(folder / "file", entries, content, chunk, residue=residue)
    header = read_header(path)
    assert header.start % 4096 == residue
    assert header.tree == content
    assert header.digests is not None
    assert header.digests.chunk == chunk
    key = lambda entry: (entry.begin, entry.end, entry.name)  # noqa: E731
    assert sorted(header.entries, key=key) == sorted(entries, key=key)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {entry.name for entry in entries}
        assert json.loads(file.metadata()["fastpersist.tree"]) == content


def test_a_file_whose_header_is_not_written_yet_was_never_finished(folder: Path) -> None:
    path = folder / "unfinished"
    path.write_bytes(bytes(8192))
    with pytest.raises(CheckpointError, match="unfinished was never finished"):
        load(path)


@pytest.mark.parametrize(
    ("header", "data", "length", "complaint"),
    [
        (b"{}", 0, 2**63, "claims 9,223,372,036,854,775,808 bytes"),
        (b"{}", 0, 2**64 - 1, "claims"),
        (b"{}", 0, 3, "claims 3 bytes"),
        (b"{}", 0, 100_000_001, "claims"),
        (b"[" * 200_000, 0, None, "too deep|recursion"),
        (b'{"a":' * 200_000, 0, None, "too deep|recursion"),
        (b"[]", 0, None, "no JSON object"),
        (b"{} x", 0, None, "damaged header"),
        (b"\xff\xfe{}", 0, None, "damaged header"),
        (b'{"a":NaN}', 0, None, "NaN"),
        (b'{"a":1,"a":1}', 0, None, "twice"),
        (b'{"a":' + b"9" * 5000 + b"}", 0, None, "damaged header"),
        ({"__metadata__": {"a": 1}}, 0, None, "metadata"),
        ({"__metadata__": []}, 0, None, "metadata"),
        ({"a": 1}, 0, None, "'a'"),
        ({"a": {"dtype": "U8", "shape": [1]}}, 1, None, "'a'"),
        ({}, 1, None, "describes"),
    ],
)
def test_hostile_headers_are_refused(
    folder: Path, header: Any, data: int, length: int | None, complaint: str
) -> None:
    path = json_file(folder / "hostile", header, data, length)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        load(path)
    assert "hostile" in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "shape", "offsets", "complaint"),
    [
        ("U9", [1], [0, 1], "unknown dtype"),
        (["U8"], [1], [0, 1], "unknown dtype"),
        ("U8", [-1], [0, 1], "no size"),
        ("U8", [True], [0, 1], "no size"),
        ("U8", [1.0], [0, 1], "no size"),
        ("U8", "1", [0, 1], "no list"),
        ("U8", [2**64], [0, 1], "no size"),
        ("U8", [2**62, 2**62, 0], [0, 0], "impossible"),
        ("U8", [1] * 100, [0, 1], "impossible"),
        ("U8", [2], [0, 1], "cannot have"),
        ("U8", [1], [1, 0], "ends before"),
        ("U8", [1], [-1, 0], "no size"),
        ("U8", [1], [0, 1, 2], "damaged"),
        ("U8", [1], [2**63, 2**63 + 1], "no size"),
        ("U8", [1], [1, 2], "hole or overlap"),
    ],
)
def test_hostile_entries_are_refused(
    folder: Path, dtype: Any, shape: Any, offsets: Any, complaint: str
) -> None:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    path = json_file(folder / "hostile", {"a": entry}, 1)
    with pytest.raises(CheckpointError, match=complaint):
        load(path)


@quick
@given(
    ranges=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=5),
    size=st.integers(0, 12),
)
def test_only_ranges_that_tile_the_data_are_accepted(
    folder: Path, ranges: list[tuple[int, int]], size: int
) -> None:
    header = {
        str(index): {"dtype": "U8", "shape": [max(0, e - b)], "data_offsets": [b, e]}
        for index, (b, e) in enumerate(ranges)
    }
    bytes_of = [byte for begin, end in ranges for byte in range(begin, end)]
    tiles = sorted(bytes_of) == list(range(size)) and all(b <= e for b, e in ranges)
    path = json_file(folder / "ranges", header, size)
    if not tiles:
        with pytest.raises(CheckpointError):
            load(path)
        return
    try:
        assert set(load(path)) == set(header)
    except CheckpointError:
        # An empty tensor inside of another one's bytes is as strange, and refused, too.
        assert any(b == e for b, e in ranges)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**65) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "tensor",
                    "view",
                    "parameter",
                    "array",
                    "dict",
                    "items",
                    "tuple",
                    "ordered",
                    "set",
                    "int",
                    "float",
                    "bytes",
                    "size",
                    "dtype",
                    "device",
                    "scalar",
                    "pickle",
                    "complex",
                    "stride",
                    "shape",
                    "offset",
                    "expanded",
                    "requires_grad",
                    "metadata",
                    "text",
                    "a",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(root=values.filter(lambda value: "nan" not in str(value) and "inf" not in str(value)))
def test_no_tree_does_worse_than_an_error(folder: Path, root: Any) -> None:
    entries = [Entry("a", "F32", (2, 3), 0, 24)]
    path = own_file(folder / "tree", entries, {"root": root, "pickles": "a"})
    with suppress(CheckpointError):
        load(path)


@pytest.mark.parametrize(
    "record",
    [
        {"tensor": "b"},
        {"tensor": ["a"]},
        {"tensor": "a", "stride": [1, 1]},
        {"tensor": "a", "stride": [-3, 1]},
        {"tensor": "a", "stride": [3]},
        {"tensor": "a", "expanded": [2]},
        {"tensor": "a", "dtype": "float64", "shape": [6]},
        {"tensor": "a", "dtype": "load", "shape": [6]},
        {"tensor": "a", "dtype": "float32", "shape": [-6]},
        {"view": "a", "offset": 0, "dtype": "float32", "shape": [7], "stride": [1]},
        {"view": "a", "offset": 24, "dtype": "float32", "shape": [1], "stride": [1]},
        {"view": "a", "offset": 2, "dtype": "float32", "shape": [1], "stride": [1]},
        {"view": "a", "offset": -4, "dtype": "float32", "shape": [1], "stride": [1]},
        {"view": "a", "offset": 0, "dtype": "float32", "shape": [2], "stride": [2**61]},
        {"view": "a", "offset": 0, "dtype": "float32", "shape": [2, 2], "stride": [1]},
        {"view": "empty", "offset": 0, "dtype": "float32", "shape": [9], "stride": [1]},
        {"parameter": {"tensor": "a"}, "requires_grad": 1},
        {"pickle": 0},
        {"unheard-of": 1},
    ],
)
def test_records_that_lead_out_of_the_stored_bytes_are_refused(
    folder: Path, record: dict[str, Any]
) -> None:
    entries = [Entry("a", "F32", (2, 3), 0, 24), Entry("empty", "F32", (0,), 24, 24)]
    path = own_file(folder / "record", entries, {"root": record, "pickles": None})
    with pytest.raises(CheckpointError, match="record"):
        load(path)


def test_a_deep_tree_is_refused(folder: Path) -> None:
    plan = draft([], "x" * 200_000, chunk=512)
    deep = replace(plan, strings={"fastpersist.tree": '{"root":' + "[" * 150_000})
    path = folder / "deep"
    path.write_bytes(deep.block(Digests(plan.start, 512, plan.size, ())))
    with pytest.raises(CheckpointError, match=r"deep.* nests too deep"):
        load(path)


def saved(path: Path) -> dict[str, Any]:
    state = {
        "weight": torch.randn(40, 25),
        "bytes": torch.arange(200, dtype=torch.uint8),
        "step": 7,
        "nested": [{"moment": torch.randn(3)}, "text"],
    }
    save(state, path)
    return state


def test_a_truncated_file_is_refused_wherever_it_was_cut(folder: Path) -> None:
    path = folder / "whole.safetensors"
    saved(path)
    content = path.read_bytes()
    start = inspect_file(path).start
    cuts = [*range(64), start - 1, start, start + 1, len(content) - 1]
    cuts += random.Random(0).sample(range(len(content)), 100)
    cut = folder / "cut.safetensors"
    for size in cuts:
        cut.write_bytes(content[:size])
        for verify in (True, False):
            with pytest.raises(CheckpointError, match="cut.safetensors"):
                load(cut, verify=verify)
    cut.write_bytes(content + b"\0")
    with pytest.raises(CheckpointError, match="cut.safetensors"):
        load(cut)


def test_every_flipped_bit_is_found(folder: Path) -> None:
    path = folder / "whole.safetensors"
    saved(path)
    content = bytearray(path.read_bytes())
    start = inspect_file(path).start
    length = content.index(b" " * 64)
    positions = [*range(8), *range(start, len(content), 37), *range(length, start, 97)]
    positions += random.Random(1).sample(range(8, length), 300)
    flipped = folder / "flipped.safetensors"
    for position in positions:
        content[position] ^= 1 << position % 8
        flipped.write_bytes(content)
        content[position] ^= 1 << position % 8
        with pytest.raises(CheckpointError, match="flipped.safetensors"):
            load(flipped)


def test_damaged_data_are_named_by_file_range_and_digest(folder: Path) -> None:
    path = folder / "data.safetensors"
    saved(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"data.safetensors is damaged in bytes .* xxh3"):
        load(path)
    with pytest.raises(CheckpointError, match="is damaged in bytes"):
        load(path, mmap=True)
    load(path, verify=False)


@quick
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_damaged_file_of_another_program_never_does_worse_than_an_error(
    folder: Path, position: int, bit: int
) -> None:
    path = folder / "foreign.safetensors"
    save_file({"a": torch.ones(5), "b": torch.ones(3, 2, dtype=torch.int64)}, path)
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << bit
    path.write_bytes(content)
    with suppress(CheckpointError):
        load(path)


def test_another_version_of_the_format_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core_fastpersist.files.header.VERSION", "99")
    path = own_file(folder / "future", [], {"root": 1, "pickles": None})
    with pytest.raises(CheckpointError, match="format version 99"):
        load(path)


def test_inspecting_tells_what_the_header_says(folder: Path) -> None:
    path = folder / "inspected.safetensors"
    saved(path)
    found = inspect_file(path)
    assert found.size == path.stat().st_size
    assert found.ours
    assert found.start % found.alignment == 0
    assert {(t.name, t.dtype, t.shape) for t in found.tensors} == {
        ("weight", "F32", (40, 25)),
        ("bytes", "U8", (200,)),
        ("nested.0.moment", "F32", (3,)),
    }
    assert found.tensors[0].begin == found.start
    assert found.tensors[-1].end == found.size
    assert found.digests is not None
    assert found.tree["dict"]["step"] == 7
