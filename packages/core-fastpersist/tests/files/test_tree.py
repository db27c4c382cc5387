"""Python trees come back equal, with their types, and what cannot is refused by name."""

from __future__ import annotations

import math
import struct
from collections import Counter, OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from core.errors import CheckpointError
from core_fastpersist.files.loading import load
from core_fastpersist.files.storing import save

Point = namedtuple("Point", "x y")


class Color(IntEnum):
    RED = 1


class Name(str):
    __slots__ = ()


class Custom:
    """An object that is no plain value, and can be pickled."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Custom) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trees")


def there_and_back(folder: Path, value: Any, **kwargs: Any) -> Any:
    path = folder / "tree.safetensors"
    save(value, path, pickle_objects=kwargs.pop("pickle_objects", False))
    return load(path, **kwargs)


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, and of the same types."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=True)
        return len(a) == len(b) and all(same(x, y) for x, y in pairs)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, set | frozenset):
        return sorted(map(repr, a)) == sorted(map(repr, b))
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b))
    return bool(a == b)


scalars: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(2**200), max_value=2**200),
    st.floats(),
    st.complex_numbers(),
    st.text(),
    st.text(st.characters(categories=["Cs", "Lu"])),
    st.binary(),
    st.binary().map(bytearray),
    st.sampled_from([torch.bfloat16, torch.float8_e4m3fn, torch.bool]),
    st.sampled_from([torch.device("cpu"), torch.device("cuda", 3)]),
    st.lists(st.integers(0, 9)).map(torch.Size),
    st.lists(st.floats(width=32), max_size=4)
    .map(torch.tensor)
    .filter(lambda tensor: not tensor.isnan().any()),
)
keys = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary()
    ),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=3,
)
trees = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4).map(OrderedDict),
        st.sets(keys, max_size=3),
        st.frozensets(keys, max_size=3),
    ),
    max_leaves=15,
)


@settings(max_examples=300, deadline=None)
@given(tree=trees)
def test_any_tree_of_plain_values_comes_back_equal_and_of_the_same_types(
    folder: Path, tree: Any
) -> None:
    assert same(tree, there_and_back(folder, tree))


def test_keys_keep_their_order_and_their_types(folder: Path) -> None:
    tree = {"b": 1, 2: "two", "a": 3, "2": 4, (1, "x"): 5, None: 6, True: 7, 0.5: 8}
    assert [*there_and_back(folder, tree).items()] == [*tree.items()]


def test_names_that_collide_and_reserved_names_come_back(folder: Path) -> None:
    tree = {
        "a.b": torch.tensor(1),
        "a": {"b": torch.tensor(2)},
        "a.b~2": torch.tensor(3),
        1: torch.tensor(4),
        "1": torch.tensor(5),
        "__metadata__": torch.tensor(6),
        "fastpersist.memory": torch.tensor(7),
        "": torch.tensor(8),
        "\ud800": torch.tensor(9),
        "?": torch.tensor(10),
        "a\x00\n\"'\\": torch.tensor(11),
    }
    found = there_and_back(folder, tree)
    assert [*found] == [*tree]
    flat = [*found.values()]
    assert [int(v if isinstance(v, torch.Tensor) else v["b"]) for v in flat] == [*range(1, 12)]


def test_numpy_arrays_and_numbers_come_back_as_such(folder: Path) -> None:
    tree = {
        "array": np.arange(6, dtype=np.uint16).reshape(2, 3),
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "reversed": np.arange(4)[::-1],
        "number": np.float32(0.1),
        "truth": np.bool_(True),
        "complex": np.complex128(1 + 2j),
        "empty": np.empty((0, 2), dtype=np.int8),
    }
    read_only = np.arange(3)
    read_only.flags.writeable = False
    tree["read_only"] = read_only
    found = there_and_back(folder, tree)
    for key, value in tree.items():
        assert type(found[key]) is type(value)
        assert found[key].dtype == value.dtype
        assert np.array_equal(found[key], value)


def test_a_module_s_state_dict_keeps_the_versions_of_its_parts(folder: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = module.state_dict()
    found = there_and_back(folder, state)
    assert type(found) is OrderedDict
    assert found._metadata == state._metadata  # type: ignore[attr-defined]
    module.load_state_dict(found)


def test_other_mappings_come_back_as_dicts(folder: Path) -> None:
    assert there_and_back(folder, Counter("aab")) == {"a": 2, "b": 1}
    assert there_and_back(folder, UserDict(x=1)) == {"x": 1}


def test_parameters_come_back_as_parameters(folder: Path) -> None:
    tree = {"w": nn.Parameter(torch.ones(2)), "f": nn.Parameter(torch.ones(2), False)}
    tree["again"] = tree["w"]
    found = there_and_back(folder, tree)
    assert type(found["w"]) is nn.Parameter
    assert found["w"].requires_grad
    assert not found["f"].requires_grad
    assert found["again"] is found["w"]
    assert type(there_and_back(folder, torch.ones(2, requires_grad=True))) is torch.Tensor


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Point(1, 2), "'a.1' is a .*Point.*\n.*_asdict"),
        (lambda: Color.RED, "'a.1' is a .*Color"),
        (lambda: Name("x"), "'a.1' is a .*Name"),
        (lambda: print, "'a.1' is a builtin_function"),
        (lambda: nn.Linear(1, 1), r"state_dict\(\)"),
        (lambda: {Custom("x"): 1}, "'a.1.a key' is a .*Custom"),
        (lambda: {Custom("x")}, "'a.1.a key' is a .*Custom"),
        (lambda: np.array(["text"]), "'a.1' is an array of <U4"),
        (lambda: np.array([object()]), "an array of object"),
        (lambda: np.arange(3, dtype=">i4"), "an array of >i4"),
        (lambda: np.datetime64("2020-01-01"), "datetime64"),
        (lambda: torch.ones(2).to_sparse(), "'a.1'.*sparse_coo"),
        (lambda: torch.ones(2, 2).to_sparse_csr(), "'a.1'.*sparse_csr"),
        (lambda: torch.empty(2, device="meta"), "'a.1' is on the meta device"),
        (lambda: torch.nested.nested_tensor([torch.ones(1)]), "'a.1'.*nested"),
        (nn.UninitializedParameter, "'a.1' is a .*UninitializedParameter"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_no_file_can_hold_is_refused_by_its_path(
    folder: Path, make: Callable[[], Any], complaint: str
) -> None:
    path = folder / "refused.safetensors"
    with pytest.raises(CheckpointError, match=complaint):
        save({"a": [1, make()]}, path)
    assert not path.exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantized_tensors_are_refused(folder: Path) -> None:
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    with pytest.raises(CheckpointError, match="is quantized"):
        save([quantized], folder / "refused.safetensors")


def test_a_dtensor_is_refused_with_advice(folder: Path) -> None:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        shard = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
        with pytest.raises(CheckpointError, match="'w' is a DTensor.*\n.*dcp"):
            save({"w": shard}, folder / "refused.safetensors")
        save({"w": shard.to_local()}, folder / "local.safetensors")
    finally:
        dist.destroy_process_group()


def test_a_tree_that_contains_itself_is_refused(folder: Path) -> None:
    tree: list[Any] = []
    tree.append(tree)
    with pytest.raises(CheckpointError, match="contains itself"):
        save(tree, folder / "refused.safetensors")


def test_other_objects_are_pickled_only_when_asked_and_read_only_when_trusted(
    folder: Path,
) -> None:
    tree = {"plain": 1, "object": Custom("x"), "tensor": torch.ones(2)}
    with pytest.raises(CheckpointError, match="pickle_objects=True"):
        there_and_back(folder, tree)
    with pytest.raises(CheckpointError, match="trust_pickles=True"):
        there_and_back(folder, tree, pickle_objects=True)
    assert same(there_and_back(folder, tree, pickle_objects=True, trust_pickles=True), tree)


def test_pickled_objects_that_torch_holds_harmless_need_no_trust(folder: Path) -> None:
    tree = {"layout": torch.strided}
    with pytest.raises(CheckpointError, match="layout"):
        there_and_back(folder, tree)
    assert there_and_back(folder, tree, pickle_objects=True) == tree


def test_what_cannot_be_pickled_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot pickle"):
        save([lambda: 1], folder / "refused.safetensors", pickle_objects=True)
