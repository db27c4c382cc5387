"""Grammars by which a model has to call functions, with arguments that fit their schemas."""

from __future__ import annotations

import json
from typing import Any

from core.errors import EngineError
from core_splitfuse.serving.structured import Grammar, Grammars, Wanted, json_grammar
from core_splitfuse.serving.tools.forms import Form, Functions

MOST_CALLS = 16
"""Calls that a model may be held to make in one answer."""


def calls_grammar(
    grammars: Grammars, form: Form, functions: Functions, *, most: int, wanted: Wanted | None
) -> Grammar:
    """Compile a grammar of one or more calls.

    Args:
        grammars: of the model's tokenizer.
        form: how the model writes calls; one that can be prescribed.
        functions: what may be called.
        most: calls in one answer, at most; forms that know of one only have one.
        wanted: what the answer may be in place of calls.

    Raises:
        EngineError: when it cannot be compiled.
    """
    if form.call is None:
        raise EngineError(f"calls in the form {form.name} cannot be prescribed")
    begin, end = (_mark(grammars, text) for text in (form.begin, form.end))
    calls = "call"
    if form.between and most > 1:
        calls += f" ({json.dumps(form.between)} call){{0,{most - 1}}}"
    if form.listed:
        calls, begin, end = f'{begin} "[" {calls} "]" {end}', "", ""
    rules = [f"start: {calls}{' | @wanted' if wanted else ''}"]
    rules.append("call: " + " | ".join(f"call{number}" for number in range(len(functions))))
    before, middle, after = form.call
    others: list[dict[str, Any]] = []
    for number, (name, schema) in enumerate(functions.items()):
        head, tail = json.dumps(f"{before}{json.dumps(name)}{middle}"), json.dumps(after)
        rules.append(f"call{number}: {begin} {head} @arguments{number} {tail} {end}")
        checked = json_grammar(schema, f"the parameters of {name}")
        others.append({**checked, "name": f"arguments{number}"})
    if wanted is not None:
        others.append({**json.loads(wanted.grammar), "name": "wanted"})
    start = {"name": "start", "lark_grammar": "\n".join(rules)}
    return grammars.compile_all([start, *others], "the tools")


def _mark(grammars: Grammars, text: str) -> str:
    """A mark in Lark: the token that it is, or its text."""
    if not text:
        return ""
    tokenizer: Any = grammars.tokenizer
    token = tokenizer.get_added_vocab().get(text)
    return json.dumps(text) if token is None else f"<[{token}]>"
