"""The model that is served: its name, its tokenizer, and what it can hold."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from core import EngineError
from core_splitfuse.serving.errors import ApiError, refuse
from core_splitfuse.serving.structured import Grammars
from core_splitfuse.serving.tokens import TokenTable
from core_splitfuse.serving.tools import Tools

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import nn
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model with its tokenizer, as the endpoints need it.

    Args:
        name: what clients call it.
        tokenizer: of transformers; its chat template is the model's.
        backend: the same, of the ``tokenizers`` library.
        context: tokens of prompt and answer at most; 0 where nothing limits them.
        stop_ids: tokens that end an answer.
        table: text and bytes of single tokens.
        grammars: for structured output.
        tools: for calls of tools.
        created: seconds since 1970.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    backend: Tokenizer
    context: int
    stop_ids: tuple[int, ...]
    table: TokenTable
    grammars: Grammars
    tools: Tools
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        context: int = 0,
        tool_format: str = "auto",
    ) -> Served:
        """Look at a model.

        Args:
            model: a causal language model of transformers.
            tokenizer: its own.
            name: what clients call it.
            context: tokens that the engine can hold, if that is less than the model can.
            tool_format: how the model writes calls of tools.

        Raises:
            EngineError: for a tokenizer that cannot give text piece by piece.
        """
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise EngineError(
                f"{type(tokenizer).__name__} cannot be served",
                why="it is none of the tokenizers library",
                fix="save it as tokenizer.json",
            )
        config: Any = model.config
        text = config.get_text_config(decoder=True)
        limits = [getattr(text, "max_position_embeddings", None) or 0, context]
        stop_ids = _stop_ids(model, tokenizer)
        grammars = Grammars(tokenizer, text.vocab_size, stop_ids)
        return cls(
            name=name,
            tokenizer=tokenizer,
            backend=backend,
            context=min((limit for limit in limits if limit), default=0),
            stop_ids=stop_ids,
            table=TokenTable(backend),
            grammars=grammars,
            tools=Tools(tokenizer, grammars, form=tool_format),
        )

    def require(self, model: str) -> None:
        """Refuse a call for another model."""
        if model != self.name:
            what = f"the model {model!r} is not served here, {self.name!r} is"
            raise ApiError(what, status=404, param="model", code="model_not_found")

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text, with what the tokenizer puts around one if ``special``."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of token ids; special tokens are left out unless wanted."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=not special)
        return text

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt that the model's chat template makes of messages.

        The template is data of the model; transformers renders it in Jinja's sandbox.
        """
        import jinja2

        tokenizer: Any = self.tokenizer
        if not tokenizer.chat_template:
            refuse("the model has no chat template: use /v1/completions", "messages")
        try:
            return str(
                tokenizer.apply_chat_template(
                    list(messages),
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=True,
                    **(values or {}),
                )
            )
        except jinja2.TemplateError as error:
            refuse(f"the chat template refuses these messages: {error}", "messages")

    def room(self, prompt: int, wanted: int | None, default: int) -> int:
        """How many tokens an answer may have.

        Args:
            prompt: tokens of the prompt.
            wanted: what was asked for.
            default: at most this many when nothing was asked for.
        """
        left = self.context - prompt if self.context else default
        if wanted is None:
            wanted = max(1, min(default, left))
        if self.context and wanted > left:
            what = (
                f"{prompt} prompt tokens and {wanted} new ones are {prompt + wanted}, "
                f"and the context is {self.context}"
            )
            raise ApiError(what, param="max_tokens", code="context_length_exceeded")
        return wanted


def _stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends an answer, as the tokenizer and the model say."""
    owners: Iterable[Any] = (
        tokenizer,
        getattr(model, "generation_config", None),
        getattr(model, "config", None),
    )
    found: dict[int, None] = {}
    for owner in owners:
        ids = getattr(owner, "eos_token_id", None)
        for number in [ids] if isinstance(ids, int) else ids or ():
            found[int(number)] = None
    return tuple(found)
