"""From tokens to text as they come: whole characters only, and stop strings that are text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTEXT = 6
"""Tokens of the prompt that are looked at, so that the space before the first word is kept."""

_PENDING = 32
"""Tokens without a whole character that are held back at most."""

_REPLACEMENT = "\ufffd"


class TextStream:
    """The text of an answer while its tokens come.

    The pieces and the end put together are what decoding all tokens at once gives. Where a decoder
    gives no such text, because it judges bytes by those that follow (SentencePiece with bytes that
    are no UTF-8), a piece that was given out stays, and the rest is decoded on its own.

    Args:
        tokenizer: of the ``tokenizers`` library.
        prompt: token ids that come before; their text is not repeated.
        keep_special: give out special tokens, too.

    Example::

        stream = TextStream(tokenizer)
        text = "".join(stream.feed(token) for token in tokens) + stream.finish()
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int] = (), *, keep_special: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = not keep_special
        context = list(prompt[-_CONTEXT:])
        if self._decode(context).endswith(_REPLACEMENT):
            context = []
        self._stream = DecodeStream(ids=context, skip_special_tokens=self._skip)
        self._before = context
        self._pending: list[int] = []

    def feed(self, token: int) -> str:
        """Take a token, and return the text that is certain now; may be empty."""
        self._pending.append(token)
        try:
            piece: str | None = self._stream.step(self._tokenizer, token)
        except Exception:
            # The decoder took back what it had said of earlier tokens.
            piece = self._decode(self._pending)
            self._stream = DecodeStream(ids=self._pending, skip_special_tokens=self._skip)
        if piece is not None:
            self._before, self._pending = self._pending, []
            return piece
        return self._release() if len(self._pending) >= _PENDING else ""

    def finish(self) -> str:
        """The text of what was held back."""
        if not self._pending:
            return ""
        before, whole = self._decode(self._before), self._decode(self._before + self._pending)
        return whole[len(before) :] if whole.startswith(before) else self._decode(self._pending)

    def _release(self) -> str:
        """Give out what no later byte can change: a character has four bytes at most."""
        whole = self._decode(self._pending)
        for kept in range(4, _PENDING // 2):
            first, last = self._pending[:-kept], self._pending[-kept:]
            if self._decode(first) + self._decode(last) == whole:
                self._stream = DecodeStream(ids=last, skip_special_tokens=self._skip)
                self._before, self._pending = [], last
                return self._decode(first)
        return ""

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=self._skip)
        return text


class StopStrings:
    """Finds the first of some strings in text that comes in pieces.

    Text that may be the beginning of one is held back. The string that is complete first counts, and
    the longest of those that end together.

    Args:
        stops: the strings; none of them empty.

    Example:
        >>> stops = StopStrings(["END"])
        >>> stops.feed("the E"), stops.feed("ND of")
        ('the ', '')
        >>> stops.found
        True
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.found = False
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, piece: str) -> str:
        """Take text, and return what is certain to come before any stop string."""
        if self.found or not self._stops:
            return "" if self.found else piece
        text = self._held + piece
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """The text that was held back for nothing."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` with which ``stop`` begins, without all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
