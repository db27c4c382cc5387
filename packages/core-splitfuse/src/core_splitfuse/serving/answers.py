"""The answers to one call: text, log-probabilities and ends, made of the engine's tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from core import Token
from core_splitfuse.serving.errors import ApiError
from core_splitfuse.serving.loop import Ticket
from core_splitfuse.serving.metrics import Meter
from core_splitfuse.serving.text import StopStrings, TextStream


@dataclass(frozen=True)
class Entry:
    """A token with its log-probability.

    Args:
        token: token id.
        logprob: natural logarithm, under the model's own distribution.
        top: the most likely tokens in its place, with theirs.
        offset: characters of the answer before it.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    offset: int


@dataclass(frozen=True)
class Piece:
    """What is new of an answer.

    Args:
        index: which answer.
        text: more of its text.
        entries: tokens of the text so far that were not told before, if asked for.
        finish: why the answer ends here, or ``None``.
    """

    index: int
    text: str
    entries: tuple[Entry, ...]
    finish: str | None


class Answer:
    """One answer as its tokens come.

    Args:
        text: makes the text.
        stops: strings that end it.
        min_tokens: tokens in whose text no string is looked for.
    """

    def __init__(self, text: TextStream, stops: Sequence[str], min_tokens: int) -> None:
        self.made = 0
        self._text = text
        self._stops = StopStrings(stops)
        self._min_tokens = min_tokens
        self._decoded = self._given = 0
        self._entries: list[Entry] = []

    def feed(self, index: int, token: Token) -> Piece:
        """Take a token, and return what is new."""
        text, finish = self._decode(token), token.finish
        if self.made > self._min_tokens:
            text = self._stops.feed(text)
        if self._stops.found:
            finish = "stop"
        elif finish is not None:
            text += self._stops.finish()
        self._given += len(text)
        everything = finish is not None and not self._stops.found
        return Piece(index, text, self._release(everything), finish)

    def _decode(self, token: Token) -> str:
        self.made += token.id >= 0
        text = ""
        # The token that stops an answer is no part of it.
        if token.id >= 0 and token.finish != "stop":
            if token.top:
                (_, logprob), *top = token.top
                self._entries.append(Entry(token.id, logprob, tuple(top), self._decoded))
            text = self._text.feed(token.id)
        if token.finish is not None:
            text += self._text.finish()
        self._decoded += len(text)
        return text

    def _release(self, everything: bool) -> tuple[Entry, ...]:
        """The entries whose text was given out; those in a stop string never are."""
        count = len(self._entries)
        if not everything:
            count = sum(entry.offset < self._given for entry in self._entries)
        released, self._entries = self._entries[:count], self._entries[count:]
        return tuple(released)


class Answers:
    """All answers to one call.

    Args:
        ticket: their tokens.
        answers: one for each request of the ticket.
        prompt_tokens: of all prompts.
        meter: counts what happens.
    """

    def __init__(
        self, ticket: Ticket, answers: Sequence[Answer], prompt_tokens: int, meter: Meter
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self._ticket = ticket
        self._answers = answers
        self._meter = meter

    @property
    def usage(self) -> dict[str, int]:
        """Tokens that were computed so far, as OpenAI tells them."""
        made = sum(answer.made for answer in self._answers)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
        }

    async def pieces(self) -> AsyncGenerator[Piece]:
        """The pieces of all answers as they come.

        Raises:
            ApiError: when the engine failed on one of them.
            UnavailableError: when the loop ended.
        """
        try:
            async for index, token in self._ticket.tokens():
                if token.finish == "error":
                    what = "the engine failed on this request"
                    raise ApiError(what, status=500, code="generation_failed")
                if token.id >= 0:
                    self._meter.token(index)
                piece = self._answers[index].feed(index, token)
                if piece.finish is not None:
                    self._ticket.cancel(index)
                    self._meter.ended(index, piece.finish)
                yield piece
        except Exception:
            self._meter.failed()
            raise

    def close(self) -> None:
        """End what has not ended: the client went away, or there was an error."""
        self._ticket.cancel()
        self._meter.gone()
