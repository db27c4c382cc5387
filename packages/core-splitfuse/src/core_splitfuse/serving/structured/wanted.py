"""What form a request wants its answer in, read from a body that anybody may have written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher, grammar_from

from core.errors import EngineError
from core_splitfuse.serving.structured.unions import plain_unions

MOST_BYTES = 131_072
"""Size that a schema or grammar may have, in bytes of UTF-8."""

MOST_PATTERN_BYTES = 16_384
"""Size that a regular expression or grammar may have, and all patterns of a schema together: the
time that they take grows with its square."""

DEEPEST = 64
"""Levels that a schema may be nested."""

MOST_CHOICES = 1024
"""Texts that may be offered as a choice."""

# Enough for indented JSON; without a bound, a model may go on with white space until its tokens
# are used up.
_JSON_STYLE = {"whitespace_pattern": r"[ \n\r\t]{0,48}", "lenient": False, "coerce_one_of": False}


@dataclass(frozen=True)
class Wanted:
    """A form of answers.

    Args:
        kind: what it was given as, for messages.
        grammar: JSON text of one grammar of llguidance, ``{"lark_grammar"| "json_schema": ...}``.
    """

    kind: str
    grammar: str


def read_wanted(body: Mapping[str, object]) -> Wanted | None:
    """Read what a request says about the form of its answer.

    Args:
        body: fields of a request: OpenAI's ``response_format``, and in the manner of vLLM
            ``structured_outputs`` or ``guided_json``, ``guided_regex``, ``guided_choice`` and
            ``guided_grammar``; others are not looked at.

    Returns:
        the form, or ``None`` where nothing was asked for.

    Raises:
        EngineError: for more than one form, an unknown one, one that is too large or too deep, and
            a schema that refers to another place.

    Example:
        >>> read_wanted({"guided_regex": "[0-9]+"}).kind
        'regex'
    """
    asked = [
        *_of_response_format(body.get("response_format")),
        *_of_fields("structured_outputs", body.get("structured_outputs")),
        *_of_fields("guided", {kind: body.get(f"guided_{kind}") for kind in _READ}),
    ]
    if len(asked) > 1:
        named = ", ".join(kind for kind, _ in asked)
        raise EngineError("an answer can have one form only", why=f"the request asks for {named}")
    if not asked:
        return None
    kind, value = asked[0]
    return Wanted(kind, json.dumps(_READ[kind](value)))


def json_grammar(schema: object, what: str = "the JSON schema") -> dict[str, Any]:
    """Check a schema and return its grammar for llguidance.

    Args:
        schema: a JSON schema as an object, as text, or a boolean.
        what: what it is called in messages.

    Raises:
        EngineError: when it is no schema, too large or too deep, or refers to another place.
    """
    if isinstance(schema, str):
        schema = _parsed(_bounded(schema, what), what)
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, Mapping):
        raise EngineError(f"{what} is no JSON object")
    _check(schema, what)
    _bounded(json.dumps(schema), what)
    return {"json_schema": {**plain_unions(schema), "x-guidance": _JSON_STYLE}}


def _of_response_format(given: object) -> list[tuple[str, object]]:
    if given is None:
        return []
    if not isinstance(given, Mapping):
        raise EngineError("response_format is no object")
    kind = given.get("type")
    if kind == "text":
        return []
    if kind == "json_object":
        return [("json_object", True)]
    if kind != "json_schema":
        known = "text, json_object, json_schema"
        raise EngineError(f"response_format.type is {kind!r}", fix=f"it is one of {known}")
    outer = given.get("json_schema")
    if not isinstance(outer, Mapping) or "schema" not in outer:
        raise EngineError("response_format.json_schema has no schema")
    return [("json", outer["schema"])]


def _of_fields(name: str, given: object) -> list[tuple[str, object]]:
    if given is None:
        return []
    if not isinstance(given, Mapping):
        raise EngineError(f"{name} is no object")
    asked = {kind: value for kind, value in given.items() if value not in (None, False)}
    unknown = sorted(str(kind) for kind in asked if kind not in _READ)
    if unknown:
        known = ", ".join(_READ)
        raise EngineError(f"{name} does not know {unknown[0]}", fix=f"it takes one of {known}")
    return list(asked.items())


def _regex(given: object) -> dict[str, Any]:
    return _grammar(LLMatcher.grammar_from_regex(_text(given, "regex")))


def _choice(given: object) -> dict[str, Any]:
    texts = given if isinstance(given, list) else []
    if not texts or len(texts) > MOST_CHOICES or not all(isinstance(t, str) and t for t in texts):
        raise EngineError(
            "choice offers no texts", fix=f"give a list of 1 to {MOST_CHOICES} texts, none empty"
        )
    return _grammar(grammar_from("choice", _bounded(json.dumps(texts), "choice")))


def _lark(given: object) -> dict[str, Any]:
    try:
        return _grammar(grammar_from("grammar", _text(given, "grammar")))
    except ValueError as error:
        raise EngineError("the grammar cannot be read", why=str(error)) from None


def _json_object(given: object) -> dict[str, Any]:
    return json_grammar({"type": "object"})


_READ: Mapping[str, Callable[[object], dict[str, Any]]] = {
    "json": json_grammar,
    "json_object": _json_object,
    "regex": _regex,
    "choice": _choice,
    "grammar": _lark,
}


def _grammar(described: str) -> dict[str, Any]:
    """The one grammar of what llguidance describes, which may be Lark text or JSON."""
    if not described.startswith("{"):
        return {"lark_grammar": described}
    found: dict[str, Any] = json.loads(described)["grammars"][0]
    return found


def _text(given: object, what: str) -> str:
    if not isinstance(given, str) or not given:
        raise EngineError(f"{what} is no text, or empty")
    return _bounded(given, what, MOST_PATTERN_BYTES)


def _bounded(text: str, what: str, most: int = MOST_BYTES) -> str:
    size = len(text.encode(errors="replace"))
    if size > most:
        raise EngineError(f"{what} has {size} bytes", why=f"at most {most} are taken")
    return text


def _parsed(text: str, what: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{what} is no JSON", why=str(error)) from None


def _check(schema: object, what: str) -> None:
    """Refuse what is nested too deep, refers to another place, or has too long patterns."""
    patterns: list[str] = []
    waiting = [(schema, 1)]
    while waiting:
        part, depth = waiting.pop()
        if depth > DEEPEST:
            raise EngineError(f"{what} is nested more than {DEEPEST} levels deep")
        if isinstance(part, Mapping):
            reference = part.get("$ref", "#")
            if isinstance(reference, str) and not reference.startswith("#"):
                why = "nothing is fetched from other places"
                raise EngineError(f"{what} refers to {reference[:200]!r}", why=why)
            patterns += _patterns(part)
            waiting.extend((inner, depth + 1) for inner in part.values())
        elif isinstance(part, list):
            waiting.extend((inner, depth + 1) for inner in part)
    _bounded("".join(patterns), f"the patterns of {what}", MOST_PATTERN_BYTES)


def _patterns(part: Mapping[str, Any]) -> list[str]:
    own, of_names = part.get("pattern"), part.get("patternProperties")
    found = [own] if isinstance(own, str) else []
    return found + (list(of_names) if isinstance(of_names, Mapping) else [])
