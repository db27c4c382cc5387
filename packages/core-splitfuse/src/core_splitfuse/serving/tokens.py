"""What single tokens stand for: their text and their bytes, as OpenAI's log-probabilities want."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTable:
    """Text and bytes of every token of a tokenizer.

    Args:
        tokenizer: of the ``tokenizers`` library.

    Example::

        table = TokenTable(tokenizer)
        table.bytes_of(5), table.text_of(5)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        described = json.dumps(json.loads(tokenizer.to_str()).get("decoder") or {})
        self._byte_level = '"ByteLevel"' in described
        self._added = {
            number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()
        }

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token puts into the text; none for ids without a token."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level:
            alphabet = _byte_alphabet()
            if all(character in alphabet for character in piece):
                return bytes(alphabet[character] for character in piece)
        found = _BYTE.fullmatch(piece)
        if found:
            return bytes([int(found[1], 16)])
        return str(piece).replace("\u2581", " ").encode()

    def text_of(self, token: int) -> str:
        """The text of a token on its own; ``bytes:`` and the bytes where they are no text."""
        found = self.bytes_of(token)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


@lru_cache
def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    # Printable bytes stand for themselves; the others follow from 256 on, in order.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}
