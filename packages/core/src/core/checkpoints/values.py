"""Plain values as JSON, with the tensors among them by reference: what stands in a manifest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from core.errors import CheckpointError

Encoded = Any
"""JSON: scalars and lists as they are, all else as an object with one key that names its kind."""


def encode(value: Any, key: str, tensors: dict[str, Tensor]) -> Encoded:
    """Encode a value as JSON that :func:`decode` turns back into an equal one.

    Args:
        value: numbers, strings, tensors, and lists, tuples and mappings of them.
        key: its name; tensors inside get dotted names below it.
        tensors: where the tensors go.

    Raises:
        CheckpointError: for a value of another type, naming its key.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Tensor):
        tensors[key] = value
        dtype = str(value.dtype).removeprefix("torch.")
        return {"tensor": [key, dtype, list(value.shape)]}
    if isinstance(value, list | tuple):
        items = [encode(item, f"{key}.{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, Mapping):
        if all(isinstance(inner, str) for inner in value):
            return {"dict": {k: encode(v, f"{key}.{k}", tensors) for k, v in value.items()}}
        pairs = [[encode(k, key, {}), encode(v, f"{key}.{k}", tensors)] for k, v in value.items()]
        return {"items": pairs}
    raise CheckpointError(
        f"{key!r} is a {type(value).__name__}, which a checkpoint cannot hold",
        why="checkpoints hold tensors, numbers, strings, and lists and mappings of them",
        fix="leave it out of state_dict(), or store what rebuilds it",
    )


def decode(value: Encoded, tensors: Mapping[str, Tensor]) -> Any:
    """Turn what :func:`encode` made back into the value, with ``tensors`` by name."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "tensor":
            return tensors[content[0]]
        case "tuple":
            return tuple(decode(item, tensors) for item in content)
        case "float":
            return float(content)
        case "items":
            return {decode(k, tensors): decode(v, tensors) for k, v in content}
        case _:
            return {key: decode(item, tensors) for key, item in content.items()}


def room_for(value: Encoded, live: Any) -> dict[str, Tensor]:
    """Tensors to read the ones of an encoded value into, by name.

    Args:
        value: the encoded value.
        live: the present value; its tensors are taken where they fit, so that they are filled in
            place, and new ones are made where it has none.
    """
    return dict(_room(value, live))


def _room(value: Encoded, live: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "tensor":
            name, dtype, shape = content
            yield name, _room_for_tensor(name, dtype, shape, live)
            return
        inner = content if kind in ("tuple", "items", "dict") else []
    else:
        kind, inner = "list", value if isinstance(value, list) else []
    for key, item in _members(kind, inner):
        yield from _room(item, _at(live, key))


def _members(kind: str, content: Any) -> Iterator[tuple[Any, Encoded]]:
    """Keys and encoded values of an encoded collection."""
    if kind == "dict":
        yield from content.items()
    elif kind == "items":
        yield from ((decode(key, {}), item) for key, item in content)
    else:
        yield from enumerate(content)


def _room_for_tensor(name: str, dtype: str, shape: list[int], live: Any) -> Tensor:
    if isinstance(live, Tensor) and list(live.shape) == shape:
        return live
    return torch.empty(shape, dtype=_dtype(name, dtype))


def _dtype(name: str, text: str) -> torch.dtype:
    found = getattr(torch, text, None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"the tensor {name!r} has the unknown dtype {text!r}")
    return found


def _at(live: Any, key: Any) -> Any:
    if isinstance(live, Mapping):
        return live.get(key)
    if isinstance(live, list | tuple) and isinstance(key, int) and key < len(live):
        return live[key]
    return None
