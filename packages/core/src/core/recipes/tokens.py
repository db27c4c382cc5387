"""From documents to batches: the tokenizer, fixed-length sequences, and their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from core.errors import DataError
from core.recipes import corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from core.recipes.settings import TrainSettings
    from core.run import Run

END = "<|endoftext|>"
"""Of every document."""

CONTINUED = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""Chat template of a model that knows no turns: what was said so far is a text to go on with."""


@dataclass(frozen=True)
class Data:
    """Tokenized text.

    Attributes:
        tokenizer: the tokenizer of the model.
        training: (sequences, length), int64.
        held_out: (sequences, length), int64.
    """

    tokenizer: PreTrainedTokenizerBase
    training: Tensor
    held_out: Tensor


def prepare(run: Run, wanted: TrainSettings) -> Data:
    """Read the text, train or load the tokenizer, and cut the tokens into sequences.

    Raises:
        DataError: when there is less text than a batch needs.
    """
    texts = corpus.documents(wanted.text, wanted.seed)
    training, held_out = corpus.split(texts, wanted.held_out)
    training = corpus.cut(training, wanted.text_limit)
    tokenizer = _tokenizer(run, wanted, training)
    data = Data(
        tokenizer,
        _sequences(tokenizer, training, wanted.sequence_length),
        _spread(_sequences(tokenizer, held_out, wanted.sequence_length), wanted.evaluate_sequences),
    )
    if len(data.training) < wanted.batch_size or len(data.held_out) == 0:
        raise DataError(
            f"the text makes {len(data.training)} training sequences of "
            f"{wanted.sequence_length} tokens and {len(data.held_out)} held-out ones",
            why=f"a batch needs {wanted.batch_size}",
            fix="give more text, or lower train.sequence_length or train.batch_size",
        )
    return data


class Order:
    """Which sequences make the batch of a step: a new permutation for every epoch.

    Depends on the step alone and not on the number of ranks, so that a resumed run goes on where
    the saved one stopped, on any number of them.
    """

    def __init__(self, sequences: Tensor, batch_size: int, seed: int) -> None:
        self._sequences = sequences
        self._batch_size = batch_size
        self._seed = seed

    def batch(self, step: int) -> Tensor:
        """The sequences of a step: (batch_size, length)."""
        first = step * self._batch_size
        picks = [self._pick(position) for position in range(first, first + self._batch_size)]
        return self._sequences[picks]

    def _pick(self, position: int) -> int:
        epoch, index = divmod(position, len(self._sequences))
        return int(self._permutation(epoch)[index])

    def _permutation(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            generator = np.random.default_rng([self._seed, epoch])
            self._order = generator.permutation(len(self._sequences))
        return self._order


def _tokenizer(run: Run, wanted: TrainSettings, texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """The user's tokenizer, the model's, the one this run made earlier, or a new one."""
    own = run.folder / "tokenizer"
    if wanted.tokenizer != "auto":
        return load_tokenizer(Path(wanted.tokenizer))
    if Path(wanted.model).is_dir():
        return load_tokenizer(Path(wanted.model))
    if run.resume and own.is_dir():
        return load_tokenizer(own)
    described = train_tokenizer(texts, wanted.vocabulary) if run.is_main else ""
    tokenizer = _wrap(run.ranks.gather(described)[0])
    tokenizer.chat_template = CONTINUED
    if run.is_main:
        tokenizer.save_pretrained(str(own))
    return tokenizer


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local folder, or from a ``tokenizer.json``.

    Raises:
        DataError: when there is none.
    """
    from transformers import AutoTokenizer

    try:
        if path.is_file():
            return _wrap(path.read_text(encoding="utf-8"))
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True
        )
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"no tokenizer in {path}", why=reason) from None
    return tokenizer


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> str:
    """Train a byte-level BPE tokenizer and return its ``tokenizer.json``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    described: str = tokenizer.to_str()
    return described


def _wrap(described: str) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer.from_str(described)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)  # type: ignore[no-untyped-call]


def _sequences(tokenizer: Any, texts: Sequence[str], length: int) -> Tensor:
    """Concatenate documents, each closed by the end token, and cut them into sequences."""
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    flat = np.concatenate([np.asarray([*ids, *end], dtype=np.int64) for ids in encoded])
    whole = len(flat) // length * length
    return torch.from_numpy(flat[:whole]).view(-1, length)


def _spread(sequences: Tensor, count: int) -> Tensor:
    """Keep ``count`` sequences, evenly spread over all documents."""
    if len(sequences) <= count:
        return sequences
    return sequences[torch.linspace(0, len(sequences) - 1, count).long()]
