"""Grammars of one tokenizer, compiled and kept."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer

from core.errors import EngineError
from core_splitfuse.serving.structured.constraint import GrammarConstraint
from core_splitfuse.serving.structured.wanted import Wanted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEPT = 16
"""Compiled grammars that are kept for the next request that asks for the same."""

# llguidance follows references by recursion, and a chain of some thousand of them, which fit into
# MOST_BYTES, overflows a common stack: that ends the process. Pages that nobody uses cost nothing.
_STACK = 512 * 2**20
_STACK_LOCK = threading.Lock()

# A state of the lexer takes up to 2 kB, and requests of anybody make them.
_LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


class Grammar:
    """A compiled grammar, for any number of answers."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def constraint(self, stop_ids: Sequence[int] = ()) -> GrammarConstraint:
        """Return a constraint for one answer.

        Args:
            stop_ids: token ids that end the answer; allowed where the grammar may end.
        """
        return GrammarConstraint(self._matcher.deep_copy(), self._vocabulary, stop_ids)


class Grammars:
    """Compiles grammars for one tokenizer. May be used from any thread.

    Args:
        tokenizer: a fast tokenizer of transformers.
        vocabulary: width of the model's logits; ids that the tokenizer does not know never come.
        end_ids: token ids that end an answer.

    Example::

        grammars = Grammars(tokenizer, model.config.vocab_size, [tokenizer.eos_token_id])
        grammar = grammars.compile(read_wanted({"guided_regex": "[0-9]{4}"}))
        Request(prompt=prompt, constraint=grammar.constraint())
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, end_ids: Sequence[int]
    ) -> None:
        self.tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._end_ids = list(end_ids)
        self._made: LLTokenizer | None = None
        self._compiler = ThreadPoolExecutor(1, "grammars")
        self._compiled = lru_cache(KEPT)(self._compile_deep)

    def compile(self, wanted: Wanted) -> Grammar:
        """Compile what a request wants.

        Raises:
            EngineError: when it cannot be compiled, or the model can have no grammar.
        """
        return self.compile_all([json.loads(wanted.grammar)], wanted.kind)

    def compile_all(self, grammars: Sequence[Mapping[str, Any]], what: str) -> Grammar:
        """Compile grammars of llguidance that refer to each other; the first one is the start.

        Args:
            grammars: each ``{"lark_grammar"| "json_schema": ..., "name": ...}``.
            what: what they are called in messages.

        Raises:
            EngineError: when they cannot be compiled, or the model can have no grammar.
        """
        return self._compiled(json.dumps({"grammars": list(grammars)}), what)

    def _compile_deep(self, described: str, what: str) -> Grammar:
        """Compile in the one thread that has a stack for it."""
        with _STACK_LOCK:
            common = threading.stack_size(_STACK)
            try:
                compiling = self._compiler.submit(self._compile, described, what)
            finally:
                threading.stack_size(common)
        return compiling.result()

    def _compile(self, described: str, what: str) -> Grammar:
        matcher = LLMatcher(self._tokenizer(), described, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise EngineError(f"{what} cannot be followed", why=_reason(matcher.get_error()))
        grammar = Grammar(matcher, self._vocabulary)
        grammar.constraint().allowed()  # What no text can satisfy is told now, not by the engine.
        return grammar

    def _tokenizer(self) -> LLTokenizer:
        if self._made is None:
            self._made = self._make()
        return self._made

    def _make(self) -> LLTokenizer:
        if not self._end_ids:
            raise EngineError(
                "this model's answers cannot be held to a grammar",
                why="no token ends an answer",
                fix="give the tokenizer an eos_token",
            )
        from transformers import PreTrainedTokenizerFast

        tokenizer = self.tokenizer
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            why = f"{type(tokenizer).__name__} is no fast tokenizer"
            raise EngineError("this tokenizer cannot be held to a grammar", why=why)
        most = max(self._vocabulary, len(tokenizer))
        try:
            return from_tokenizer(tokenizer, n_vocab=most, eos_token=self._end_ids)
        except ValueError as error:
            why = _reason(str(error))
            raise EngineError("this tokenizer cannot be held to a grammar", why=why) from None


def _reason(error: str) -> str:
    """What llguidance says, without the excerpt of the grammar below it."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return " ".join(line for n, line in enumerate(lines) if n == 0 or line.startswith("error:"))
