"""Layouts of new safetensors files: the library of the format reads all of them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file

from core.errors import CheckpointError
from core_ucp.files.safetensors import Layout, Tensor, lay_out, read_tensors

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn, torch.int64]
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
tensors = st.lists(
    st.tuples(st.text(min_size=1, max_size=8), st.sampled_from(DTYPES), shapes),
    max_size=8,
    unique_by=lambda item: item[0],
)


@settings(max_examples=60, deadline=None)
@given(tensors, st.integers(1, 200))
def test_what_is_laid_out_is_read_back(
    found: list[tuple[str, torch.dtype, tuple[int, ...]]], limit: int
) -> None:
    items = [Tensor(*item) for item in found if item[0] != "__metadata__"]
    layout = lay_out(items, limit=limit)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        truth = _fill(folder, items, layout)
        names = [file.name for file in layout.files if file.name.endswith(".safetensors")]
        loaded = {key: t for file in names for key, t in load_file(folder / file).items()}
        assert loaded.keys() == truth.keys()
        for tensor in items:
            assert (loaded[tensor.name].dtype, loaded[tensor.name].shape) == tensor[1:]
            flat = loaded[tensor.name].reshape(-1).view(torch.uint8)
            assert flat.numpy().tobytes() == truth[tensor.name]
        again = read_tensors(folder, names)
        for tensor in items:
            atom = again.atoms[tensor.name]
            place = layout.places[tensor.name]
            assert (atom.dtype, atom.shape) == tensor[1:]
            assert atom.pieces.offset.tolist() == [place.offset]
            assert again.files.names[int(atom.pieces.file[0])] == layout.files[place.file].name
        if len(names) > 1:
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            assert index["weight_map"].keys() == truth.keys()
            assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in items)


def _fill(folder: Path, items: list[Tensor], layout: Layout) -> dict[str, bytes]:
    contents = []
    for file in layout.files:
        content = bytearray(file.size)
        for offset, part in file.parts:
            content[offset : offset + len(part)] = part
        contents.append(content)
    truth = {}
    random = np.random.default_rng(0)
    for tensor in items:
        high = 2 if tensor.dtype == torch.bool else 256
        truth[tensor.name] = random.integers(0, high, tensor.nbytes).astype(np.uint8).tobytes()
        place = layout.places[tensor.name]
        contents[place.file][place.offset : place.offset + tensor.nbytes] = truth[tensor.name]
    for file, content in zip(layout.files, contents, strict=True):
        (folder / file.name).write_bytes(content)
    return truth


def test_a_tensor_larger_than_the_limit_has_a_file_of_its_own() -> None:
    items = [Tensor(str(n), torch.float32, (size,)) for n, size in enumerate([1, 1, 100, 1])]
    layout = lay_out(items, limit=16)
    assert [layout.places[item.name].file for item in items] == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (Tensor("odd", torch.complex128, (1,)), "'odd'"),
        (Tensor("__metadata__", torch.float32, (1,)), "__metadata__"),
    ],
)
def test_what_the_format_lacks_is_named(item: Tensor, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        lay_out([item])


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(CheckpointError, match="two tensors called 'a'"):
        lay_out([Tensor("a", torch.float32, (1,)), Tensor("a", torch.float32, (2,))])
