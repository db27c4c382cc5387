"""Text for models: read, tokenized, cut into sequences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.recipes import corpus
from core.recipes.tokens import load_tokenizer
from core_fp6.quality.calibration import tokenize

if TYPE_CHECKING:
    from torch import Tensor, nn

_LENGTH = 512
_CHARACTERS = 8
"""Characters that are read for each token that is wanted: most tokenizers need less."""


def sequences(
    model: nn.Module, folder: Path, texts: Sequence[str], count: int, parts: int
) -> list[Tensor]:
    """Read text and cut its tokens into sequences.

    Args:
        model: that they are for; it says how long a sequence may be.
        folder: of its tokenizer.
        texts: files or folders of text, or ``stdlib``.
        count: sequences of each part, at most.
        parts: into which the documents are dealt, one or two.

    Returns:
        int64 ``[sequences, length]`` of each part.

    Raises:
        DataError: for text or a tokenizer that is missing, and for too little text.
    """
    tokenizer = load_tokenizer(folder)
    config: Any = model.config
    length = min(_LENGTH, int(getattr(config, "max_position_embeddings", _LENGTH)))
    documents = corpus.documents(texts, seed=0)
    dealt = corpus.split(documents, 0.5) if parts == 2 else (documents,)
    limit = _CHARACTERS * length * count
    return [tokenize(tokenizer, corpus.cut(each, limit), length, count) for each in dealt]
