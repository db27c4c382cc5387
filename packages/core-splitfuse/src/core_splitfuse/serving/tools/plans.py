"""What a request's ``tools`` and ``tool_choice`` mean for one model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from core.errors import EngineError
from core_splitfuse.serving.structured import Grammar, Grammars, Wanted
from core_splitfuse.serving.tools.forms import FORMS, Form, Functions, detect
from core_splitfuse.serving.tools.offered import read_choice, read_functions
from core_splitfuse.serving.tools.prescribed import MOST_CALLS, calls_grammar
from core_splitfuse.serving.tools.reader import Reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.utils.chat_parsing.response_templates import ResponseTemplate


@dataclass(frozen=True)
class Plan:
    """How one request is prompted, held to its form, and read.

    Args:
        tools: for the chat template; ``None`` for none.
        grammar: what the answer is held to; ``None`` for nothing.
        keeps_special: whether the answer is decoded with its special tokens.
        form: how calls are written; ``None`` where the response template tells.
        template: for transformers' response parser; ``None`` where all is content.
        functions: schemas of what may be called.
    """

    tools: list[dict[str, Any]] | None = None
    grammar: Grammar | None = None
    keeps_special: bool = False
    form: Form | None = None
    template: ResponseTemplate | None = None
    functions: Functions = field(default_factory=dict[str, Mapping[str, Any]])

    def reader(self, prompt: str) -> Reader:
        """Return a reader for one answer.

        Args:
            prompt: the prompt as text; it may have begun the answer.
        """
        from transformers.utils.chat_parsing import ResponseParser

        if self.template is None:
            return Reader(None, None, self.functions)
        # Our own forms have nothing to find in a prompt, which may show examples of calls.
        prefix = prompt if self.form is None else ""
        told: list[Any] | None = self.tools
        parser = ResponseParser(self.template, prefix=prefix, tools=told)
        return Reader(parser, self.form, self.functions)


class Tools:
    """Plans requests with and without tools, for one model.

    Args:
        tokenizer: of the model; its ``response_template`` is used where it has one.
        grammars: of the same tokenizer.
        chat_template: used in place of the tokenizer's own.
        form: name of one of :data:`FORMS`, or ``auto`` for what the templates tell.

    Raises:
        EngineError: for an unknown form.

    Example::

        plan = Tools(tokenizer, grammars).plan(body.get("tools"), body.get("tool_choice"))
        prompt = tokenizer.apply_chat_template(messages, tools=plan.tools, tokenize=False)
        reader = plan.reader(prompt)
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        grammars: Grammars,
        *,
        chat_template: str | None = None,
        form: str = "auto",
    ) -> None:
        if form != "auto" and form not in FORMS:
            known = ", ".join(["auto", *FORMS])
            raise EngineError(
                f"no form of tool calls is called {form!r}", fix=f"take one of {known}"
            )
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._chat_template = chat_template or _text_of(tokenizer.chat_template)
        own = getattr(tokenizer, "response_template", None)
        self._response_template = _loaded(own) if own and form == "auto" else None
        self._form = detect(self._chat_template) if form == "auto" else FORMS[form]

    def plan(
        self,
        tools: Sequence[Mapping[str, object]] | None,
        choice: object = None,
        *,
        parallel: bool = True,
        wanted: Wanted | None = None,
    ) -> Plan:
        """Plan a request.

        Args:
            tools: as in OpenAI's API; ``None`` or none for an answer without calls.
            choice: ``tool_choice``: ``none``, ``auto``, ``required`` or a function by name.
            parallel: whether an answer may have several calls.
            wanted: form of an answer that is no call.

        Raises:
            EngineError: for tools that cannot be used, and a choice that is unknown or without its
                function.
        """
        functions = read_functions(tools or [])
        chosen = read_choice(choice, functions)
        if not functions or choice == "none":
            return self._without_tools(wanted)
        if not re.search(r"\btools\b", self._chat_template):
            raise EngineError(
                "this model cannot be told of tools",
                why="its chat template has no place for them",
                fix="serve it with a chat template that takes tools",
            )
        told = [dict(tool) for tool in tools or []]
        own = self._response_template
        if not chosen and wanted is None:
            if own is not None:
                return Plan(told, None, True, None, own, functions)
            return self._with_tools(told, self._form, functions, None)
        # What no grammar can prescribe is prescribed as JSON.
        form = self._form if self._form.call and own is None else FORMS["json"]
        grammar = calls_grammar(
            self._grammars,
            form,
            {name: functions[name] for name in chosen or functions},
            most=1 if isinstance(choice, Mapping) or not parallel else MOST_CALLS,
            wanted=None if chosen else wanted,
        )
        return self._with_tools(told, form, functions, grammar)

    def _without_tools(self, wanted: Wanted | None) -> Plan:
        if wanted is not None:
            return Plan(grammar=self._grammars.compile(wanted))
        own = self._response_template
        return Plan(template=own, keeps_special=own is not None)

    def _with_tools(
        self,
        tools: list[dict[str, Any]],
        form: Form,
        functions: Functions,
        grammar: Grammar | None,
    ) -> Plan:
        special = not form.marks.isdisjoint(self._tokenizer.all_special_tokens)
        return Plan(tools, grammar, special, form, _loaded(form.response_template()), functions)


def _text_of(template: str | Mapping[str, str] | None) -> str:
    """The template that is used with tools; some tokenizers have several."""
    if isinstance(template, Mapping):
        return template.get("tool_use") or template.get("default") or ""
    return template or ""


def _loaded(template: Mapping[str, Any]) -> ResponseTemplate:
    from transformers.utils.chat_parsing.response_templates import load_response_template

    try:
        return load_response_template(dict(template))
    except (ValueError, TypeError) as error:
        raise EngineError("the tokenizer's response_template is wrong", why=str(error)) from None
