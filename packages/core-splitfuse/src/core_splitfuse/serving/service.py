"""From a call's body to requests of the engine."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from core import Request, Sampling
from core_splitfuse.serving.answers import Answer, Answers
from core_splitfuse.serving.errors import refuse
from core_splitfuse.serving.loop import EngineLoop
from core_splitfuse.serving.metrics import Meter, Metrics
from core_splitfuse.serving.protocol import ANSWERS, Generate
from core_splitfuse.serving.served import Served
from core_splitfuse.serving.structured import Grammar, Wanted, read_wanted
from core_splitfuse.serving.text import TextStream

T = TypeVar("T")

_EXTRAS = ("priority", "deadline", "cache_salt")


@dataclass(frozen=True, kw_only=True)
class How:
    """What differs between chats and completions.

    Args:
        max_tokens: tokens of an answer at most, or ``None`` for what is left.
        default: tokens of an answer when nothing is said.
        top: log-probabilities of so many tokens; -1 for none.
        grammar: what the answers may consist of.
        keep_special: whether special tokens belong to the text.
    """

    max_tokens: int | None
    default: int
    top: int
    grammar: Grammar | None = None
    keep_special: bool = False


class Service:
    """What the endpoints have in common.

    Args:
        loop: the engine's loop.
        served: the model.
        default_tokens: tokens of a chat's answer when the call does not say.
    """

    def __init__(self, loop: EngineLoop, served: Served, *, default_tokens: int = 4096) -> None:
        self.loop = loop
        self.served = served
        self.default_tokens = default_tokens
        self.metrics = Metrics(loop, served.name)

    async def ask(self, prompts: Sequence[Sequence[int]], body: Generate, how: How) -> Answers:
        """Queue ``n`` answers to every prompt, those of one prompt next to each other.

        Raises:
            ApiError: for a body that cannot be answered.
            EngineError: when the engine refuses it.
        """
        count = body.n or 1
        if count * len(prompts) > ANSWERS:
            refuse(f"{count} answers to {len(prompts)} prompts are more than {ANSWERS}", "n")
        if body.stream_options is not None and not body.stream:
            refuse("only for streams", "stream_options")
        requests: list[Request] = []
        answers: list[Answer] = []
        seed = secrets.randbits(63) if body.seed is None else body.seed
        for prompt in prompts:
            sampling = self._sampling(body, how, len(prompt))
            for sample in range(count):
                requests.append(self._request(prompt, sampling, _seed(seed, sample), body, how))
                text = TextStream(self.served.backend, prompt, keep_special=how.keep_special)
                answers.append(Answer(text, body.stop or (), body.min_tokens or 0))
        tokens = sum(map(len, prompts))
        meter = Meter(self.metrics, tokens, len(answers))
        ticket = await self.loop.submit(requests)
        return Answers(ticket, answers, tokens, meter)

    async def wanted(self, body: Generate) -> Wanted | None:
        """What the answers may consist of, as the body says."""
        return await asyncio.to_thread(read_wanted, body.model_dump(exclude_none=True))

    async def compile(self, wanted: Wanted) -> Grammar:
        """The grammar of it; made beside the event loop, for the first one takes a while."""
        return await asyncio.to_thread(self.served.grammars.compile, wanted)

    async def encode(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        """Token ids of texts, made beside the event loop.

        Raises:
            ApiError: for a text that is none.
        """
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:
            refuse("the text is no Unicode: it holds half a surrogate pair", "")
        encode = self.served.encode
        return await asyncio.to_thread(lambda: [encode(text, special=special) for text in texts])

    def _request(
        self, prompt: Sequence[int], sampling: Sampling, seed: int, body: Generate, how: How
    ) -> Request:
        extras = {name: getattr(body, name) for name in _EXTRAS}
        return Request(
            prompt=prompt,
            sampling=replace(sampling, seed=seed),
            constraint=None if how.grammar is None else how.grammar.constraint(sampling.stop_ids),
            extras={name: value for name, value in extras.items() if value is not None},
        )

    def _sampling(self, body: Generate, how: How, prompt: int) -> Sampling:
        max_tokens = self.served.room(prompt, how.max_tokens, how.default)
        min_tokens = body.min_tokens or 0
        if min_tokens > max_tokens:
            refuse(f"{min_tokens} are more than max_tokens, {max_tokens}", "min_tokens")
        own = () if body.ignore_eos else self.served.stop_ids
        return Sampling(
            max_new_tokens=max_tokens,
            min_new_tokens=min_tokens,
            temperature=_given(body.temperature, 1.0),
            top_p=_given(body.top_p, 1.0),
            top_k=max(_given(body.top_k, 0), 0),
            min_p=_given(body.min_p, 0.0),
            repetition_penalty=_given(body.repetition_penalty, 1.0),
            presence_penalty=_given(body.presence_penalty, 0.0),
            frequency_penalty=_given(body.frequency_penalty, 0.0),
            logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
            stop_ids=tuple(dict.fromkeys((*own, *(body.stop_token_ids or ())))),
            top_logprobs=how.top,
        )


def _given(value: T | None, default: T) -> T:
    """A field that is there, or what it is by default."""
    return default if value is None else value


def _seed(seed: int, sample: int) -> int:
    """The seed of a sample: another one for each, and those of two calls are not the same ones."""
    if sample == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
