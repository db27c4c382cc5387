"""Any Python tree as JSON, with the tensors among its leaves by reference.

JSON scalars and lists stand for themselves; all else is an object whose first key names its kind.
Objects that occur twice come back as two, but for tensors: the same view of the same memory is one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.errors import CheckpointError
from core_fastpersist.files.leaves import Leaves
from core_fastpersist.files.scalars import (
    NUMBERS,
    Encoded,
    decode_plain,
    encode_plain,
    expect,
    is_text,
)

LEAVES = ("tensor", "view", "parameter", "array")
"""Kinds that lead to a tensor."""
_DEEPEST = 128
"""Levels of a tree: few enough for the JSON parser of any reader."""
_METADATA = "_metadata"
_ROOT = "tensor"


class Encoder:
    """Turns one tree into JSON.

    Args:
        pickling: whether objects of other types are collected for a pickle, instead of refused.

    Attributes:
        leaves: the tensors that were found.
        pickled: the objects that only a pickle can hold.
    """

    def __init__(self, *, pickling: bool = False) -> None:
        self.leaves = Leaves()
        self.pickled: list[Any] = []
        self._pickling = pickling

    def encode(self, value: Any) -> Encoded:
        """Encode a tree.

        Raises:
            CheckpointError: for a value that JSON cannot hold, naming the path of its key.
        """
        try:
            return self._encode(value, ())
        except RecursionError:
            raise CheckpointError(
                "what is saved nests too deep", why="or a collection contains itself"
            ) from None

    def _encode(self, value: Any, path: tuple[Any, ...]) -> Encoded:
        if len(path) > _DEEPEST:
            raise RecursionError
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if isinstance(value, np.ndarray):
            return {"array": self.leaves.add(_dotted(path), _from_numpy(value, path))}
        if type(value) is list:
            return [self._encode(item, (*path, i)) for i, item in enumerate(value)]
        if type(value) is tuple:
            return {"tuple": [self._encode(item, (*path, i)) for i, item in enumerate(value)]}
        if isinstance(value, Mapping):
            return self._mapping(value, path)
        found = _simple(value, path)
        if found is not None or value is None:
            return found
        if not self._pickling:
            raise _refusal(value, path)
        self.pickled.append(value)
        return {"pickle": len(self.pickled) - 1}

    def _tensor(self, value: Tensor, path: tuple[Any, ...]) -> Encoded:
        record = self.leaves.add(_dotted(path), value)
        if isinstance(value, torch.nn.Parameter):
            return {"parameter": record, "requires_grad": value.requires_grad}
        return record

    def _mapping(self, value: Mapping[Any, Any], path: tuple[Any, ...]) -> Encoded:
        if all(type(key) is str and is_text(key) for key in value):
            found: Encoded = {"dict": {k: self._encode(v, (*path, k)) for k, v in value.items()}}
        else:
            items = value.items()
            found = {"items": [[_key(k, path), self._encode(v, (*path, k))] for k, v in items]}
        if not isinstance(value, OrderedDict):
            return found
        # A module's state_dict() carries the versions of its parts in an attribute.
        extra = getattr(value, _METADATA, None)
        return {"ordered": found, "metadata": self._encode(extra, (*path, _METADATA))}


class Decoder:
    """Turns JSON back into a tree.

    Args:
        leaf: gives the object for an encoded leaf, whose kind is one of :data:`LEAVES`.
        pickled: gives an object of the pickle by its number.
    """

    def __init__(self, leaf: Callable[[Encoded], Any], pickled: Callable[[int], Any]) -> None:
        self._leaf = leaf
        self._pickled = pickled

    def decode(self, value: Encoded) -> Any:
        """Decode a tree.

        Raises:
            ValueError, KeyError, TypeError, RecursionError: for JSON that no encoder has written.
        """
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return _scalar(value)
        kind = next(iter(value), "")
        if kind in LEAVES:
            return self._leaf(value)
        content = value[kind] if kind else None
        match kind:
            case "dict" | "items" | "ordered":
                return self._mapping(kind, content, value)
            case "tuple":
                return tuple(self.decode(item) for item in expect(list, content))
            case "pickle":
                return self._pickled(expect(int, content))
            case "set" | "frozenset":
                members = [_decode_key(item) for item in expect(list, content)]
                return set(members) if kind == "set" else frozenset(members)
            case _:
                return decode_plain(kind, content)

    def _mapping(self, kind: str, content: Any, value: Any) -> Any:
        if kind == "ordered":
            found = OrderedDict(expect(dict, self.decode(content)))
            metadata = self.decode(value["metadata"])
            if metadata is not None:
                setattr(found, _METADATA, metadata)
            return found
        return {key: self.decode(item) for key, item in members(value)}


def members(value: Encoded) -> Iterator[tuple[Any, Encoded]]:
    """Keys and encoded values of an encoded collection; nothing for anything else.

    Raises:
        ValueError, TypeError: for a collection that is none.
    """
    if isinstance(value, list):
        yield from enumerate(value)
        return
    if not isinstance(value, dict):
        return
    kind = next(iter(value), "")
    match kind:
        case "dict":
            yield from expect(dict, value[kind]).items()
        case "tuple":
            yield from enumerate(expect(list, value[kind]))
        case "ordered":
            yield from members(value[kind])
        case "items":
            pairs = [(_decode_key(key), item) for key, item in expect(list, value[kind])]
            if len(dict(pairs)) != len(pairs):
                raise ValueError("a key stands there twice")
            yield from pairs
        case _:
            pass


def leaf_pairs(value: Encoded, live: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """Every encoded leaf of a tree with what stands at its place in a live one.

    Raises:
        CheckpointError: where the live tree has another structure, naming the path.
    """
    if isinstance(value, dict) and next(iter(value), "") in LEAVES:
        if not isinstance(live, Tensor | np.ndarray):
            raise CheckpointError(
                f"the file has a tensor at {_dotted(path)!r}", why=f"`into` has {_kind(live)}"
            )
        yield value, live
        return
    inner = dict(members(value))
    if isinstance(live, Mapping):
        there = dict(live)
    elif isinstance(live, list | tuple):
        there = dict(enumerate(live))
    else:
        there = {}
    if isinstance(live, Tensor | np.ndarray) or inner.keys() != there.keys():
        where = repr(_dotted(path)) if path else "its root"
        names = [str(key) for key in [*(inner.keys() ^ there.keys())][:5]]
        raise CheckpointError(
            f"`into` has another structure than the file at {where}",
            why=f"only one of them has {', '.join(sorted(names))}" if names else _kind(live),
        )
    for key, item in inner.items():
        yield from leaf_pairs(item, there[key], (*path, key))


def _simple(value: Any, path: tuple[Any, ...]) -> Encoded | None:
    """A value without tensors inside; ``None`` for another type, and for ``None``."""
    if type(value) in (set, frozenset):
        return {type(value).__name__: [_key(item, path) for item in value]}
    return encode_plain(value)


def _key(value: Any, path: tuple[Any, ...]) -> Encoded:
    """A key of a mapping, or a member of a set: what can be hashed."""
    if type(value) is tuple:
        return {"tuple": [_key(item, path) for item in value]}
    found = _simple(value, path)
    if found is None and value is not None:
        raise _refusal(value, (*path, "a key"))
    return found


def _decode_key(value: Encoded) -> Any:
    if isinstance(value, list):
        raise TypeError("a list is no key")
    found = Decoder(_no_key, _no_key).decode(value)
    hash(found)
    return found


def _no_key(value: Any) -> Any:
    raise TypeError("a tensor is no key")


def _scalar(value: Any) -> Any:
    if isinstance(value, float):
        raise TypeError("floats are written in hex")
    return value


def _from_numpy(value: np.ndarray[Any, Any], path: tuple[Any, ...]) -> Tensor:
    plain = type(value) is np.ndarray and value.dtype.kind in NUMBERS
    if not plain or not value.dtype.isnative:
        raise _refusal(value, path, f"an array of {value.dtype}")
    if not value.flags.writeable or any(step < 0 for step in value.strides):
        value = value.copy()
    try:
        return torch.from_numpy(value)
    except (TypeError, ValueError):
        raise _refusal(value, path, f"an array of {value.dtype}") from None


def _refusal(value: Any, path: tuple[Any, ...], what: str = "") -> CheckpointError:
    if hasattr(value, "state_dict"):
        fix = "save its state_dict()"
    elif isinstance(value, tuple):
        fix = "save its _asdict(), or tuple(...) of it"
    else:
        fix = "leave it out, store what rebuilds it, or save(..., pickle_objects=True)"
    where = repr(_dotted(path)) if path else "what is saved"
    return CheckpointError(f"{where} is {what or _kind(value)}, which no file can hold", fix=fix)


def _kind(value: Any) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}".replace("builtins.", "")


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(str(key) for key in path) if path else _ROOT
