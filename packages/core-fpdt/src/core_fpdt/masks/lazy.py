"""The lazy mask: one object that answers for any range of queries and keys.

transformers composes a mask as a function of indices and gives it to whatever is registered for an
attention. What is registered here keeps the function and evaluates it tile by tile, where it must.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from core.errors import ModelError
from core_fpdt.masks.composed import both
from core_fpdt.masks.evaluated import Extent, Given, MaskFunction
from core_fpdt.masks.evaluating import Evaluator
from core_fpdt.masks.held import Padding
from core_fpdt.masks.recognise import recognise
from core_fpdt.masks.rules import EVALUATION, EVERYTHING, NOTHING, Causal, Range, Rule, grid
from core_fpdt.masks.sharing import shared
from core_fpdt.masks.tiles import Kind, Tile

TILES = 2**16
"""Tiles that one mask remembers the kind of."""

_HIDING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class LazyMask:
    """Who sees whom in one call of a model; made once per call, and shared by its layers.

    A row that sees nothing, such as padding on the left, has no visible key here, exactly as in
    transformers' boolean masks: its lse is ``-inf`` and its output 0, where transformers' eager
    attention would average over all keys.

    Args:
        rule: who sees whom.
        extent: rows, queries, keys and device of the call. Indices are those of the sequence: the
            first query of a call that goes on after 7 tokens is 7.

    Example:
        >>> mask = lazy_mask(batch_size=1, q_length=8, kv_length=8)
        >>> [mask.tile((4, 8), keys).kind.value for keys in ((0, 4), (4, 8))]
        ['full', 'causal']
    """

    def __init__(self, rule: Rule, extent: Extent) -> None:
        self._rule = rule
        self._extent = extent
        # Tiles refer to it and not to the mask: nothing is kept alive by a circle.
        self._evaluator = Evaluator(extent.batch, extent.device)
        self._tiles: OrderedDict[tuple[Range, Range], Tile] = OrderedDict()

    @classmethod
    def of(cls, mask: Tensor) -> LazyMask:
        """Wrap a mask that somebody made.

        Args:
            mask: (B or 1, H or 1, Tq, Tk) booleans, true where a query sees a key; or numbers to add
                to the scores that are 0, ``-inf`` or the smallest one of a float dtype.

        Raises:
            ModelError: for anything else, such as a bias.
        """
        what = "the attention mask cannot be used"
        if mask.dim() != 4:
            why = f"its shape is {tuple(mask.shape)}"
            raise ModelError(what, why=why, fix="give (batch, heads, queries, keys)")
        extent = Extent(mask.shape[0], (0, mask.shape[2]), (0, mask.shape[3]), mask.device)
        return cls(Given(extent, _booleans(mask, what)), extent)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the mask as a tensor, which is what transformers asks of one that was made before."""
        (first, last), (begin, end) = self.queries, self.keys
        return self.batch, 1, last - first, end - begin

    @property
    def ndim(self) -> int:
        """Dimensions of that tensor."""
        return len(self.shape)

    @property
    def queries(self) -> Range:
        """Indices of the queries that can be asked about."""
        return self._extent.queries

    @property
    def keys(self) -> Range:
        """Indices of the keys that can be asked about."""
        return self._extent.keys

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return self._extent.batch

    def tile(self, queries: Range, keys: Range) -> Tile:
        """Answer for a range of queries and a range of keys.

        Most tiles are classified from numbers alone. Only a mask function that is not known, or a mask
        that was given, is evaluated here; anything else when :meth:`Tile.visible` is asked for.

        Raises:
            ValueError: for an empty range, or one that leaves the mask.
        """
        place = queries, keys
        found = self._tiles.get(place)
        if found is None:
            _check(queries, self.queries, "queries")
            _check(keys, self.keys, "keys")
            found = self._tiles[place] = self._classified(queries, keys)
            if len(self._tiles) > TILES:
                self._tiles.popitem(last=False)
        return found

    def horizon(self, edge: int) -> int:
        """Index behind the last key that any query before ``edge`` may see, and at least ``edge``.

        May lie farther than it must, never nearer. The first horizon asked of a mask with a function
        that is not known evaluates it at all pairs, in pieces.
        """
        return max(edge, min(self._rule.horizon(edge), self.keys[1]))

    def dense(self) -> Tensor:
        """The whole mask, (B or 1, H or 1, Tq, Tk) booleans, as ``sdpa_mask`` makes it; for small calls."""
        (first, last), (begin, end) = self.queries, self.keys
        seen = self._rule.visible(grid(*self._extent))
        return seen.expand(*seen.shape[:2], last - first, end - begin).contiguous()

    def with_documents(self, documents: Tensor) -> LazyMask:
        """Make the mask of the whole sequence of which the model sees a part on this rank.

        Args:
            documents: (B, S) number of the document of each token of the whole sequence, -1 for
                padding. Tokens of one document follow each other.

        Returns:
            A mask of S queries and S keys: the rules of this one, asked with indices of the whole
            sequence, where both tokens are of one document.

        Raises:
            ModelError: for a mask that says something of the tokens of this rank alone, such as
                padding, restarting positions, blocks or a function that is not known.
        """
        ids = documents.to(self._extent.device)
        whole = (0, ids.shape[1])
        extent = Extent(ids.shape[0], whole, whole, self._extent.device)
        return LazyMask(shared(self._rule, ids), extent)

    def _classified(self, queries: Range, keys: Range) -> Tile:
        rule = self._decided(self._rule, queries, keys)
        if rule == NOTHING:
            return Tile(Kind.EMPTY, queries, keys)
        kind = Kind.PARTIAL
        if rule == EVERYTHING:
            kind = Kind.FULL
        elif isinstance(rule, Causal) and queries[0] == keys[0]:
            kind = Kind.CAUSAL
        return Tile(kind, queries, keys, partial(self._evaluator, rule, queries, keys))

    def _decided(self, rule: Rule, queries: Range, keys: Range) -> Rule:
        """What is left to evaluate in a tile: everything, nothing, or some of the rules."""
        every = (1 << self.batch) - 1
        hidden, shown = rule.sight(queries, keys)
        if hidden & every == every:
            return NOTHING
        if shown & every == every:
            return EVERYTHING
        rule = rule.narrow(queries, keys)
        return self._looked_at(rule, queries, keys) if rule.price == EVALUATION else rule

    def _looked_at(self, rule: Rule, queries: Range, keys: Range) -> Rule:
        seen = self._evaluator(rule, queries, keys)
        if not seen.any():
            return NOTHING
        if seen.all():
            return EVERYTHING
        causal = Causal().visible(grid(1, queries, keys, self._extent.device))
        return Causal() if bool((seen == causal).all()) else rule


def lazy_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | None = None,
    *,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> LazyMask:
    """Make a lazy mask: what is registered with transformers' ``AttentionMaskInterface``.

    Never ``None``: there is no case in which an attention would have to guess what was meant.

    Args:
        batch_size: rows.
        q_length: queries of the call.
        kv_length: keys of the call.
        q_offset: index of the first query.
        kv_offset: index of the first key.
        mask_function: (batch, head, query, key) indices to whether the query sees the key; causal if
            not given.
        attention_mask: (B, L) false or 0 where a key is padding; what lies behind its end is.
        use_vmap: evaluate functions that are not known for single pairs, vectorized.
        device: where the mask is evaluated.

    Example::

        AttentionMaskInterface.register("core_fpdt", lazy_mask)
    """
    first = int(q_offset)
    queries, keys = (first, first + q_length), (kv_offset, kv_offset + kv_length)
    extent = Extent(batch_size, queries, keys, torch.device(device))
    rule: Rule = Causal()
    if mask_function is not None:
        rule = recognise(mask_function, extent, use_vmap=use_vmap)
    if attention_mask is not None:
        missing = max(0, keys[1] - attention_mask.shape[-1])
        rule = both(rule, Padding(pad(attention_mask.to(extent.device, torch.bool), (0, missing))))
    return LazyMask(rule, extent)


def edges(length: int, chunk: int, mask: LazyMask) -> list[int]:
    """Cut a sequence so that nobody sees behind the end of its own chunk.

    An edge moves to the right until nothing in front of it sees behind it: out of a block of tokens
    that all see each other, or to the very end where everybody sees everybody.

    Args:
        length: tokens of the sequence.
        chunk: tokens of a chunk, as far as that is possible.
        mask: who sees whom.

    Returns:
        ``[0, ..., length]``, rising.

    Example:
        >>> edges(10, 4, lazy_mask(batch_size=1, q_length=10, kv_length=10))
        [0, 4, 8, 10]
    """
    found = [0]
    while found[-1] < length:
        edge = min(found[-1] + chunk, length)
        while (farther := min(mask.horizon(edge), length)) > edge:
            edge = farther
        found.append(edge)
    return found


def _check(span: Range, whole: Range, what: str) -> None:
    if not whole[0] <= span[0] < span[1] <= whole[1]:
        raise ValueError(f"{what} {span} are not within {whole}")


def _booleans(mask: Tensor, what: str) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    fix = "give booleans, or a mask that is 0 where a query sees a key and -inf elsewhere"
    if not mask.is_floating_point():
        raise ModelError(what, why=f"its dtype is {mask.dtype}", fix=fix)
    seen = mask == 0
    hidden = mask == -torch.inf
    for smallest in (torch.finfo(dtype).min for dtype in _HIDING):
        if smallest >= torch.finfo(mask.dtype).min:
            hidden |= mask == smallest
    if not bool((seen | hidden).all()):
        raise ModelError(what, why="it is a bias: it adds something to the scores", fix=fix)
    return seen
