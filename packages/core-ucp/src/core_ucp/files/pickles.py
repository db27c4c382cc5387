"""Unpickling what ``torch.save`` wrote without running any of it.

Plain values and tensors come out as they are, tensors as references to their bytes. Objects of
other classes come out as inert records where the caller allows their names, and are an error where
not: nothing is ever imported or called on behalf of a file.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch

from core.checkpoints.blobs import STORAGES
from core.errors import CheckpointError
from core_ucp.files.stored import Inert as Inert, Located as Located, Storage as Storage

_MOST_DIMENSIONS = 64
_LARGEST = 2**62
"""Sizes, strides and bytes of tensors stay below this, so that tables can hold them."""
_DEEPEST = 200
"""Levels of dictionaries, lists and objects inside of each other."""
_SIZED = dict, list, tuple, set
_HOLDERS = (*_SIZED, Inert)
_MOST_VALUES = 2**25
"""Values of a tree when what stands in several places is counted at each of them."""


def unpickle(
    data: bytes,
    name: str,
    storage: Callable[[str, torch.dtype, int], Storage],
    allow: Collection[str] = (),
) -> Any:
    """Read a pickle of plain values and tensors.

    Args:
        data: the pickle.
        name: of the file, for messages.
        storage: finds the bytes of a storage by its key, dtype, and number of elements.
        allow: dotted names of classes and functions (``*`` stands for anything) that come out as
            :class:`Inert`.

    Raises:
        CheckpointError: for a global that is not allowed, naming it, and for a damaged pickle, or
            one that holds itself.
    """
    try:
        found = _Unpickler(data, name, storage, allow).load()
        _require_tree(found)
        return found
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged pickle makes of the parser
        why = str(error) or type(error).__name__
        raise CheckpointError(
            f"{name} is damaged", why=f"its pickle cannot be read: {why}"
        ) from None


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        data: bytes,
        name: str,
        storage: Callable[[str, torch.dtype, int], Storage],
        allow: Collection[str],
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._name, self._storage, self._allow = name, storage, allow
        self._kinds: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        # Protocol 2 has the names of Python 2.
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        known = _KNOWN.get(full)
        if known is not None:
            return known
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if any(fnmatchcase(full, pattern) for pattern in self._allow):
            return self._kinds.setdefault(full, _inert_class(full))
        raise CheckpointError(
            f"blocked global {full} in {self._name}",
            why="a pickle may run code through it, and only known names are allowed",
            fix="save plain values and tensors, or convert the file where it was written",
        )

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"unknown persistent object {kind!r}")
        return self._storage(str(key), dtype, _count(numel))


def _require_tree(root: Any) -> None:
    """Refuse what would keep those who walk through it busy for ever.

    A few references make a list that holds itself, or one of billions of values.
    """
    known: dict[int, tuple[int, int] | None] = {}

    def measure(value: Any, depth: int) -> tuple[int, int]:
        """Values and levels below a value."""
        if id(value) not in known:
            if depth > _DEEPEST:
                raise pickle.UnpicklingError(f"it is more than {_DEEPEST} levels deep")
            known[id(value)] = None
            inner = [measure(each, depth + 1) for each in _inside(value)]
            count = len(value) if isinstance(value, _SIZED) else 1
            found = count + sum(n for n, _ in inner), 1 + max((d for _, d in inner), default=0)
            known[id(value)] = found
        measured = known[id(value)]
        if measured is None:
            raise pickle.UnpicklingError("it holds itself")
        if measured[0] > _MOST_VALUES or depth + measured[1] > _DEEPEST + 1:
            raise pickle.UnpicklingError(
                f"it has {measured[0]:,} values on {depth + measured[1]} levels"
            )
        return measured

    measure(root, 0)


def _inside(value: Any) -> Iterable[Any]:
    """What a value holds that can hold something itself."""
    match value:
        case dict():
            inner: Iterable[Any] = [*value.values(), *value]
        case list() | tuple() | set():
            inner = value
        case Inert():
            inner = (value.arguments, value.state, value.items)
        case _:
            inner = ()
    return [each for each in inner if isinstance(each, _HOLDERS)]


def _inert_class(full: str) -> type[Inert]:
    """A class of its own for every name: pickles make objects through ``__new__`` and calls."""

    def new(cls: type[Inert], *arguments: Any, **named: Any) -> Inert:
        made = object.__new__(cls)
        Inert.__init__(made, full, arguments, named or None)
        return made

    def nothing(self: Inert, *arguments: Any, **named: Any) -> None:
        """All that there is to do was done in ``__new__``."""

    body: dict[str, Any] = {"__new__": new, "__init__": nothing}
    return type(full.rpartition(".")[2], (Inert,), body)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _LARGEST:
        raise pickle.UnpicklingError(f"{value!r} is no count")
    return value


def _rebuild_v2(storage: Any, first: Any, shape: Any, stride: Any, *_: Any) -> Located:
    return _located(storage, storage.dtype, first, shape, stride)


def _rebuild_v3(
    storage: Any,
    first: Any,
    shape: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    *_: Any,
) -> Located:
    return _located(storage, dtype, first, shape, stride)


def _located(storage: Any, dtype: Any, first: Any, shape: Any, stride: Any) -> Located:
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("a tensor without a storage")
    sizes = tuple(_count(size) for size in shape)
    steps = tuple(_count(step) for step in stride)
    if len(sizes) != len(steps) or len(sizes) > _MOST_DIMENSIONS:
        raise pickle.UnpicklingError(f"a tensor with {len(sizes)} sizes and {len(steps)} strides")
    last = _count(first) + sum(
        (size - 1) * step for size, step in zip(sizes, steps, strict=True) if size
    )
    if max(math.prod(sizes), *steps, first) * dtype.itemsize >= _LARGEST:
        raise pickle.UnpicklingError(f"a tensor of {list(sizes)} with steps of {list(steps)}")
    if math.prod(sizes) and (last + 1) * dtype.itemsize > storage.nbytes:
        raise pickle.UnpicklingError(
            f"a tensor ends at byte {(last + 1) * dtype.itemsize:,} of a storage of"
            f" {storage.nbytes:,}"
        )
    return Located(storage, dtype, sizes, steps, first)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor with attributes, or one of another class."""
    if not isinstance(function, _Known) and not _is_inert(function):
        raise pickle.UnpicklingError(f"a tensor made by {function!r}")
    made = function(*arguments)
    if _is_inert(kind):
        inert: Inert = kind(made)
        inert.state = state
        return inert
    return made


def _is_inert(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Inert)


def _size(sizes: Any = ()) -> torch.Size:
    return torch.Size([_count(size) for size in sizes])


def _encode(text: Any, encoding: Any = "") -> bytes:
    """How protocol 2 writes bytes."""
    if encoding != "latin1" or not isinstance(text, str):
        raise pickle.UnpicklingError(f"text in {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How protocol 2 writes bytes when there are none."""
    return b""


def _defaultdict(factory: Any = None, *_: Any) -> dict[Any, Any]:
    return {}


def _device(kind: Any = "cpu", *_: Any) -> str:
    return str(kind)


class _Known:
    """A call that a pickle may make; it has no attributes that a pickle could replace."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a known function is no object with a state")


def _never(*_: Any) -> Any:
    raise pickle.UnpicklingError("a tensor is made without its storage")


_KNOWN: dict[str, Any] = {
    "torch._utils._rebuild_tensor": _Known(_rebuild_v2),
    "torch._utils._rebuild_tensor_v2": _Known(_rebuild_v2),
    "torch._utils._rebuild_tensor_v3": _Known(_rebuild_v3),
    "torch._utils._rebuild_parameter": _Known(_rebuild_parameter),
    "torch._utils._rebuild_parameter_with_state": _Known(_rebuild_parameter),
    "torch._tensor._rebuild_from_type_v2": _Known(_rebuild_from_type),
    "torch.Tensor": _Known(_never),
    "torch.nn.parameter.Parameter": _Known(_never),
    "torch.Size": _Known(_size),
    "torch.device": _Known(_device),
    "collections.OrderedDict": collections.OrderedDict,
    "collections.defaultdict": _Known(_defaultdict),
    "_codecs.encode": _Known(_encode),
    "builtins.bytes": _Known(_no_bytes),
    "builtins.set": set,
    "builtins.dict": dict,
    "builtins.list": list,
    "builtins.int": int,
    "builtins.float": float,
    "builtins.complex": complex,
}
