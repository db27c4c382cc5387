"""Plain values as JSON, equal to the bit when they come back: floats in hex, bytes in base64."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

Encoded = Any
"""JSON: scalars and lists as they are, all else as an object whose first key names its kind."""
NUMBERS = "biufc"
"""Kinds of numpy dtypes that are kept."""
_NUMPY_DTYPE = re.compile(r"[<|][biufc]\d{1,2}")
_LARGEST_JSON_INT = 2**63


def encode_plain(value: Any) -> Encoded | None:
    """A value without others inside; ``None`` for ``None``, and for a value of another type."""
    kind = type(value)
    if kind is bool or (kind is int and abs(value) < _LARGEST_JSON_INT):
        return value
    if kind is str and is_text(value):
        return value
    if kind in _ENCODE:
        name, encode = _ENCODE[kind]
        return {name: encode(value)}
    if isinstance(value, np.generic) and value.dtype.kind in NUMBERS:
        return {"scalar": _encode_numpy(value)}
    return None


def decode_plain(kind: str, content: Any) -> Any:
    """The value of an encoded object.

    Raises:
        ValueError, TypeError: for a kind that is unknown, or another content than it has.
    """
    if kind not in _DECODE:
        raise ValueError(f"its tree has a {kind[:40]!r}, which this version does not know")
    return _DECODE[kind](content)


def is_text(value: str) -> bool:
    """Whether UTF-8 can hold a string, which it cannot if half of a surrogate pair is in it."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def expect(kind: type, value: Any) -> Any:
    """A value of JSON that has the type it should have.

    Raises:
        TypeError: when it has another.
    """
    if type(value) is not kind:
        raise TypeError(f"{str(value)[:40]!r} is no {kind.__name__}")
    return value


def dtype_called(name: Any) -> torch.dtype:
    """The dtype of a name like ``bfloat16``.

    Raises:
        ValueError: for another name.
    """
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{str(name)[:40]!r} is no dtype")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` of ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _encode_complex(value: complex) -> Encoded:
    return [value.real.hex(), value.imag.hex()]


def _decode_complex(content: Any) -> complex:
    real, imaginary = expect(list, content)
    return complex(_decode_float(real), _decode_float(imaginary))


def _decode_float(content: Any) -> float:
    return float.fromhex(expect(str, content))


def _encode_bytes(value: bytes | bytearray) -> str:
    return base64.b64encode(value).decode()


def _decode_bytes(content: Any) -> bytes:
    return base64.b64decode(expect(str, content), validate=True)


def _encode_text(value: str) -> str:
    return value.encode("utf-8", "surrogatepass").hex()


def _decode_text(content: Any) -> str:
    return bytes.fromhex(expect(str, content)).decode("utf-8", "surrogatepass")


def _decode_size(content: Any) -> torch.Size:
    return torch.Size([expect(int, size) for size in expect(list, content)])


def _decode_device(content: Any) -> torch.device:
    try:
        return torch.device(expect(str, content))
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def _encode_numpy(value: np.generic) -> Encoded:
    data = np.asarray(value, dtype=value.dtype.newbyteorder("<"))
    return [data.dtype.str, data.tobytes().hex()]


def _decode_numpy(content: Any) -> Any:
    name, data = expect(list, content)
    if _NUMPY_DTYPE.fullmatch(expect(str, name)) is None:
        raise ValueError(f"{name[:40]!r} is no dtype of a number")
    (found,) = np.frombuffer(bytes.fromhex(expect(str, data)), dtype=np.dtype(name))
    return found


_ENCODE: Mapping[type, tuple[str, Callable[[Any], Encoded]]] = {
    int: ("int", hex),
    str: ("text", _encode_text),
    float: ("float", float.hex),
    complex: ("complex", _encode_complex),
    bytes: ("bytes", _encode_bytes),
    bytearray: ("bytearray", _encode_bytes),
    torch.Size: ("size", list),
    torch.dtype: ("dtype", dtype_name),
    torch.device: ("device", str),
}
_DECODE: Mapping[str, Callable[[Any], Any]] = {
    "int": lambda content: int(expect(str, content), 16),
    "text": _decode_text,
    "float": _decode_float,
    "complex": _decode_complex,
    "bytes": _decode_bytes,
    "bytearray": lambda content: bytearray(_decode_bytes(content)),
    "size": _decode_size,
    "dtype": dtype_called,
    "device": _decode_device,
    "scalar": _decode_numpy,
}
