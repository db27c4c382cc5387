"""Calls into a library of C kernels."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from core.native import Variant
from core_splitfuse.attention.dense import Rule
from core_splitfuse.attention.spans import Span

DTYPES = (torch.float32, torch.bfloat16)
"""What the kernels read and write."""


class _Store(ctypes.Structure):
    """``struct store`` of attention.h."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("slots", c_int64),
        ("kv_heads", c_int64),
        ("width", c_int64),
        ("value_width", c_int64),
        ("single", c_int64),
    )


class _Pass(ctypes.Structure):
    """``struct pass`` of attention.h."""

    _fields_ = (
        ("spans", c_void_p),
        ("tables", c_void_p),
        ("slots", c_void_p),
        ("count", c_int64),
        ("block", c_int64),
        ("tokens", c_int64),
    )


class _Kept(ctypes.Structure):
    """``struct kept`` of attention.h."""

    _fields_ = (
        ("store", c_void_p),
        ("listed", c_void_p),
        ("key", c_void_p),
        ("value", c_void_p),
        ("key_head", c_int64),
        ("key_row", c_int64),
        ("value_head", c_int64),
        ("value_row", c_int64),
    )


class _Attention(ctypes.Structure):
    """``struct attention`` of attention.h."""

    _fields_ = (
        ("store", c_void_p),
        ("listed", c_void_p),
        ("query", c_void_p),
        ("out", c_void_p),
        ("sinks", c_void_p),
        ("query_head", c_int64),
        ("query_row", c_int64),
        ("heads", c_int64),
        ("window", c_int64),
        ("scaling", c_float),
        ("softcap", c_float),
    )


class Stored:
    """Keys and values of a layer as the kernels see them.

    Args:
        keys: (Hkv, S, D), contiguous.
        values: (Hkv, S, Dv), contiguous.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._kinds = [(rows.dtype, rows.shape[2]) for rows in (keys, values)]
        self._slots = keys.shape[1]
        self._tensors = keys, values  # kept alive for the library
        self._struct = _Store(
            keys.data_ptr(),
            values.data_ptr(),
            keys.shape[1],
            keys.shape[0],
            keys.shape[2],
            values.shape[2],
            keys.dtype == torch.float32,
        )
        self.at = ctypes.addressof(self._struct)

    def require(self, listed: Listed, like_keys: Tensor, like_values: Tensor) -> None:
        """The library trusts its caller: what it reads and writes must be there.

        Raises:
            IndexError: for slots that are not.
            ValueError: for rows of another kind.
        """
        if listed.slots > self._slots:
            what = f"{listed.slots} slots are asked for, and the store has {self._slots}"
            raise IndexError(what)
        for (dtype, width), other in zip(self._kinds, (like_keys, like_values), strict=True):
            if other.dtype != dtype or other.size(2) != width:
                what = f"rows of {width} {dtype} are kept"
                raise ValueError(f"{what}, not {other.size(2)} {other.dtype}")


class Listed:
    """A pass as the kernels see it, for all layers.

    Args:
        spans: all of it.
        slots: (T,) int64, where the store keeps every token.
        block_size: tokens in a block of the store.
    """

    def __init__(self, spans: Sequence[Span], slots: Tensor, block_size: int) -> None:
        self._tables = array("i")
        self._spans = array("q")
        self._slots = slots
        for span in spans:
            self._spans.extend((span.row, span.begin, span.end, len(self._tables)))
            self._tables.extend(span.table[: -(-span.end // block_size)])
        self.slots = (max(self._tables) + 1) * block_size
        """Slots that a store must have."""
        self._struct = _Pass(
            self._spans.buffer_info()[0],
            self._tables.buffer_info()[0],
            slots.data_ptr(),
            len(spans),
            block_size,
            len(slots),
        )
        self.at = ctypes.addressof(self._struct)


class Native:
    """Attention by a library; threads are those of its own pool, as many as torch uses.

    Args:
        library: built from the sources beside this file.
        variant: which one it is, and why.
    """

    def __init__(self, library: ctypes.CDLL, variant: Variant) -> None:
        self.variant = variant
        self._attend = library.core_splitfuse_attend
        self._attend.argtypes, self._attend.restype = [c_void_p, c_int32], c_int32
        self._keep = library.core_splitfuse_keep
        self._keep.argtypes, self._keep.restype = [c_void_p, c_int32], None

    def keep(self, stored: Stored, key: Tensor, value: Tensor, listed: Listed) -> None:
        """Put keys (Hkv, T, D) and values (Hkv, T, Dv) into their slots.

        Raises:
            IndexError: for a store without these slots.
            ValueError: for rows of another kind.
        """
        stored.require(listed, key, value)
        key_head, key_row, one = key.stride()
        value_head, value_row, another = value.stride()
        if not one == another == 1:
            return self.keep(stored, key.contiguous(), value.contiguous(), listed)
        call = _Kept(
            stored.at,
            listed.at,
            key.data_ptr(),
            value.data_ptr(),
            key_head,
            key_row,
            value_head,
            value_row,
        )
        self._keep(ctypes.addressof(call), torch.get_num_threads())
        return None

    def attend(
        self, stored: Stored, query: Tensor, listed: Listed, rule: Rule, out: Tensor
    ) -> None:
        """Attend over stored keys and values.

        Args:
            stored: the layer's.
            query: (H, T, D) of the packed row.
            listed: the pass.
            rule: the layer's.
            out: (T, H, Dv), contiguous.

        Raises:
            IndexError: for a store without these slots.
            ValueError: for rows of another kind.
            MemoryError: without room for the parts of long sequences.
        """
        stored.require(listed, query, out)
        head, row, one = query.stride()
        if one != 1:
            return self.attend(stored, query.contiguous(), listed, rule, out)
        # This name keeps what the library reads alive until it is done.
        sinks = None if rule.sinks is None else rule.sinks.detach().float().contiguous()
        call = _Attention(
            stored.at,
            listed.at,
            query.data_ptr(),
            out.data_ptr(),
            None if sinks is None else sinks.data_ptr(),
            head,
            row,
            query.shape[0],
            rule.window or 0,
            rule.scaling,
            rule.softcap or 0.0,
        )
        if self._attend(ctypes.addressof(call), torch.get_num_threads()):
            raise MemoryError("there is no memory for an attention over long sequences")
        return None
