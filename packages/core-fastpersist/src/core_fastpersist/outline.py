"""The Python structure of a file as indented lines, without a tensor being loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from core.errors import CheckpointError
from core_fastpersist.files.scalars import Encoded
from core_fastpersist.files.tree import LEAVES, Decoder, members

_COLLECTIONS = {"dict": "dict", "items": "dict", "ordered": "OrderedDict", "tuple": "tuple"}
_WIDEST = 80


def outline(tree: Encoded, tensors: Sequence[Mapping[str, Any]]) -> list[str]:
    """Show a tree.

    Args:
        tree: as it stands in the header of a file.
        tensors: name, dtype and shape of the stored tensors.

    Raises:
        CheckpointError: for a tree that no encoder has written.
    """
    known = {row["name"]: row for row in tensors}
    try:
        return list(_lines("", tree, "", known))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("the tree of the file is damaged", why=str(error)) from None
    except RecursionError:
        raise CheckpointError("the tree of the file is damaged", why="it nests too deep") from None


def _lines(
    key: str, value: Encoded, indent: str, known: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    label = f"{indent}{key}: " if key else indent
    kind = next(iter(value), "") if isinstance(value, dict) else ""
    if kind in LEAVES:
        yield label + _leaf(kind, value, known)
    elif kind in _COLLECTIONS or isinstance(value, list):
        inner = list(members(value))
        yield f"{label}{_COLLECTIONS.get(kind, 'list')} of {len(inner):,}"
        for name, item in inner:
            yield from _lines(str(name), item, indent + "  ", known)
    elif kind == "pickle":
        yield f"{label}a pickled object"
    else:
        text = repr(_PLAIN.decode(value))
        yield label + (text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…")


def _leaf(kind: str, value: Any, known: Mapping[str, Mapping[str, Any]]) -> str:
    """A tensor by what is stored of it, and by the place it is a view of."""
    inner = value[kind]
    if isinstance(inner, dict):  # a parameter or an array, around the record of its tensor
        return f"{kind}, {_leaf(next(iter(inner)), inner, known)}"
    row = known[inner]
    dtype, shape = value.get("dtype", row["dtype"]), value.get("shape", row["shape"])
    where = f"view of {inner!r}" if kind == "view" else repr(inner)
    return f"tensor {dtype} {list(shape)}, {where}"


def _no_leaf(value: Any) -> Any:
    raise TypeError("a tensor stands where none can be")


_PLAIN = Decoder(_no_leaf, _no_leaf)
