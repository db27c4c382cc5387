"""Texts in, texts out, without a server: the engine in the caller's own thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from core.engines import FinishReason, Request, Sampling
from core.errors import EngineError
from core.recipes.models import load_model
from core.recipes.tokens import load_tokenizer
from core.settings import check
from core_splitfuse.engine.engine import Engine
from core_splitfuse.serving.text import StopStrings, TextStream
from core_splitfuse.settings import SplitFuseSettings


@dataclass(frozen=True, kw_only=True)
class Text:
    """The answer to one prompt.

    Args:
        text: what was generated, without the stop string that ended it.
        ids: token ids.
        finish: why it ended.
    """

    text: str
    ids: tuple[int, ...]
    finish: FinishReason


class Pipeline:
    """Completes texts with a model, many at once. Made by :func:`pipeline`."""

    def __init__(self, model: nn.Module, tokenizer: Any, engine: Engine) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.engine = engine

    def __call__(
        self, prompts: str | Sequence[str], stop: Sequence[str] = (), **sampling: Any
    ) -> list[Text]:
        """Complete prompts, in the order given.

        Args:
            prompts: one text or several.
            stop: strings that end an answer.
            sampling: fields of :class:`core.engines.Sampling`; the tokenizer's end of text stops, too.

        Raises:
            EngineError: for a prompt that the engine refuses; the others are not begun then.
            SettingsError: for sampling that is out of range.
        """
        given = [prompts] if isinstance(prompts, str) else list(prompts)
        texts: list[list[str]] = [[] for _ in given]
        ends: list[Text | None] = [None] * len(given)
        for index, piece, end in self._run(given, stop, sampling):
            texts[index].append(piece)
            ends[index] = end
        found: list[Text] = []
        for pieces, ended in zip(texts, ends, strict=True):
            if ended is None:
                raise EngineError("the engine stopped before all answers had ended")
            found.append(replace(ended, text="".join(pieces)))
        return found

    def stream(self, prompt: str, stop: Sequence[str] = (), **sampling: Any) -> Iterator[str]:
        """Complete one prompt, and yield its text piece by piece.

        Args:
            prompt: the text.
            stop: strings that end the answer.
            sampling: fields of :class:`core.engines.Sampling`.

        Raises:
            EngineError: for a prompt that the engine refuses.
        """
        for _, piece, _ in self._run([prompt], stop, sampling):
            if piece:
                yield piece

    def close(self) -> None:
        """Give back the engine's memory; the model is as it was before."""
        self.engine.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(
        self, prompts: Sequence[str], stop: Sequence[str], sampling: dict[str, Any]
    ) -> Iterator[tuple[int, str, Text | None]]:
        """Pieces of text as they come, with the index of their prompt, and each one's end."""
        end = self.tokenizer.eos_token_id
        stop_ids = (*sampling.pop("stop_ids", ()), *(() if end is None else (end,)))
        wanted = check(Sampling, stop_ids=stop_ids, **sampling)
        open_: dict[int, _Open] = {}
        try:
            for index, prompt in enumerate(prompts):
                ids = self.tokenizer(prompt)["input_ids"]
                number = self.engine.add(Request(prompt=ids, sampling=wanted))
                open_[number] = _Open(
                    index, TextStream(self.tokenizer.backend_tokenizer, ids), stop
                )
            while open_:
                for token in self.engine.step():
                    answer = open_.get(token.request)
                    if answer is None:
                        continue
                    piece = answer.take(token.id)
                    finish: FinishReason | None = "stop" if answer.stops.found else token.finish
                    if finish is None:
                        yield answer.index, piece, None
                        continue
                    del open_[token.request]
                    self.engine.cancel(token.request)
                    piece += answer.rest()
                    end = Text(text="", ids=tuple(answer.ids), finish=finish)
                    yield answer.index, piece, end
        finally:
            for number in open_:
                self.engine.cancel(number)
            while self.engine.busy:
                self.engine.step()


class _Open:
    """An answer that has not ended."""

    def __init__(self, index: int, text: TextStream, stop: Sequence[str]) -> None:
        self.index = index
        self.ids: list[int] = []
        self.stops = StopStrings(stop)
        self._text = text

    def take(self, token: int) -> str:
        if token < 0:
            return ""
        self.ids.append(token)
        return self.stops.feed(self._text.feed(token))

    def rest(self) -> str:
        """What was held back; nothing once a stop string was found."""
        return self.stops.feed(self._text.finish()) + self.stops.finish()


def pipeline(
    model: nn.Module | str | Path,
    tokenizer: Any = None,
    settings: SplitFuseSettings | None = None,
    **changes: Any,
) -> Pipeline:
    """Make what completes texts with a model, in this process.

    Args:
        model: a live causal language model, or a local folder in the Hugging Face layout.
        tokenizer: of transformers, with a live model; that of the folder otherwise.
        settings: of the engine.
        **changes: fields of the settings to replace.

    Raises:
        EngineError: for a live model without a tokenizer.
        ModelError: for a folder or a model that cannot be served.

    Example::

        with pipeline("runs/quickstart/model") as complete:
            for answer in complete(["def main(", "import "], max_new_tokens=32):
                print(answer.text)
    """
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise EngineError("a live model needs its tokenizer", fix="pipeline(model, tokenizer)")
        loaded = model
    else:
        loaded = load_model(Path(model)).requires_grad_(False)
        tokenizer = tokenizer or load_tokenizer(Path(model))
    return Pipeline(loaded, tokenizer, Engine(loaded, settings, **changes))
