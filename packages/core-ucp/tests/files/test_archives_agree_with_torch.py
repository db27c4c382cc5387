"""What is read without running a pickle is what torch.load returns, bit for bit."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from core_ucp.files.archives import holds_mapping, read_archive
from core_ucp.files.pickles import Inert, Located
from core_ucp.view.files import Files

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.uint16,
)

shapes = st.lists(st.integers(0, 5), max_size=4)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Tensors of all kinds of memory: whole, transposed, sliced, expanded, shared."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(shapes)
    count = int(np.prod(shape)) * dtype.itemsize
    seed = draw(st.integers(0, 2**31))
    data = torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))
    whole = (data.to(torch.uint8) & 1 if dtype is torch.bool else data.to(torch.uint8)).view(dtype)
    tensor = whole.reshape(shape)
    match draw(st.sampled_from(["whole", "transposed", "sliced", "expanded"])):
        case "transposed":
            return tensor.permute(tuple(reversed(range(tensor.dim()))))
        case "sliced" if tensor.dim() and tensor.shape[-1] > 1:
            return tensor[..., 1::2]
        case "expanded":
            return tensor.unsqueeze(0).expand(3, *tensor.shape)
        case _:
            return tensor


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | tensors(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)


def read(files: Files, tensor: Located) -> torch.Tensor:
    """The bytes that a reference means, as a tensor."""
    if not tensor.numel:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    buffer = bytearray(tensor.storage.nbytes)
    files.read_into(tensor.file, tensor.storage.offset, memoryview(buffer))
    flat = torch.frombuffer(buffer, dtype=torch.uint8)
    typed = flat[: len(flat) - len(flat) % tensor.dtype.itemsize].view(tensor.dtype)
    return torch.as_strided(typed, tensor.shape, tensor.stride, tensor.first)


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """A flat copy; a view of one element can have any stride."""
    return torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))


def assert_same(files: Files, found: Any, expected: Any) -> None:
    """Compare trees; tensors by their bits."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, Located)
        assert (found.dtype, found.shape) == (expected.dtype, tuple(expected.shape))
        bits = [dense(tensor).view(torch.uint8) for tensor in (read(files, found), expected)]
        assert torch.equal(*bits)
        assert not found.contiguous or found.pieces().stride.shape == (1, expected.dim())
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(files, found[key], value)
    elif isinstance(expected, list | tuple):
        assert (type(found), len(found)) == (type(expected), len(expected))
        for left, right in zip(found, expected, strict=True):
            assert_same(files, left, right)
    else:
        assert found == expected
        assert type(found) is type(expected)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(tree=values, protocol=st.sampled_from([2, 4, 5]))
def test_trees(tree: Any, protocol: int, tmp_path: Path) -> None:
    torch.save(tree, tmp_path / "a.pt", pickle_protocol=protocol)
    files = Files(tmp_path)
    assert_same(files, read_archive(files, "a.pt"), tree)
    assert holds_mapping(tmp_path / "a.pt") or not isinstance(tree, dict)


@pytest.mark.parametrize(
    "tree", [[1, 2], "text", torch.zeros(2)], ids=lambda tree: type(tree).__name__
)
def test_what_is_no_mapping_is_told_from_one(tree: Any, tmp_path: Path) -> None:
    torch.save(tree, tmp_path / "a.pt")
    assert not holds_mapping(tmp_path / "a.pt")


def test_tensors_that_share_memory_share_a_storage(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    torch.save(
        {"whole": whole, "part": whole[3:9].view(2, 3), "other": whole.clone()}, tmp_path / "a"
    )
    files = Files(tmp_path)
    found = read_archive(files, "a")
    assert found["whole"].storage == found["part"].storage != found["other"].storage
    assert found["part"].offset == found["whole"].offset + 12
    assert torch.equal(read(files, found["part"]), whole[3:9].view(2, 3))


def test_parameters_modules_states_and_attributes(tmp_path: Path) -> None:
    tensor = torch.ones(2)
    tensor.note = "kept by torch"  # type: ignore[attr-defined]
    state = OrderedDict(torch.nn.Linear(2, 3).state_dict())
    tree = {"parameter": torch.nn.Parameter(torch.ones(3)), "noted": tensor, "state": state}
    torch.save(tree, tmp_path / "a")
    files = Files(tmp_path)
    found = read_archive(files, "a")
    assert_same(files, found["parameter"], torch.ones(3))
    assert_same(files, found["noted"], torch.ones(2))
    assert isinstance(found["state"], OrderedDict)
    assert_same(files, dict(found["state"]), dict(state))


class Settings:
    """An object that a user saves along."""

    def __init__(self) -> None:
        self.rate, self.weight = 0.1, torch.ones(2)


def test_allowed_objects_are_inert(tmp_path: Path) -> None:
    torch.save({"settings": Settings()}, tmp_path / "a")
    files = Files(tmp_path)
    name = f"{Settings.__module__}.Settings"
    for allowed in (name, "*.Settings"):
        found = read_archive(files, "a", {allowed})["settings"]
        assert isinstance(found, Inert)
        assert (found.kind, found.get("rate"), found.get("other", 7)) == (name, 0.1, 7)
        assert_same(files, found.get("weight"), torch.ones(2))


def test_a_file_of_any_size_is_opened_by_its_head_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"a": torch.ones(1 << 20), "b": torch.ones(3)}, tmp_path / "a")
    files = Files(tmp_path)
    count = 0
    plain = Files.read_into

    def counted(self: Files, index: int, offset: int, buffer: memoryview) -> None:
        nonlocal count
        count += len(buffer)
        plain(self, index, offset, buffer)

    monkeypatch.setattr(Files, "read_into", counted)
    read_archive(files, "a")
    assert count < 1 << 18
