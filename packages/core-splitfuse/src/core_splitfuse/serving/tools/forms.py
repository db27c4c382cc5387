"""The forms in which models write calls of functions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Functions = Mapping[str, Mapping[str, Any]]
"""The JSON schema of the arguments of every function that may be called, by its name."""

Calls = list[tuple[str, dict[str, Any]]]
"""Names of functions, with arguments."""


@dataclass(frozen=True)
class Form:
    """How a model writes a call.

    Args:
        name: what an option calls it.
        open: regular expression of what begins calls.
        begin: the text that begins calls; empty where only their JSON tells.
        end: the text that ends one; empty where the answer's end does.
        read: reads what is between, given the functions; ``None`` when it is no call.
        call: text before the name, before the arguments and after them; empty where a grammar
            cannot prescribe it.
        between: text between calls; empty where there is one only.
        listed: calls are the items of one JSON list, within ``begin`` and ``end``.
        nine: whether templates take ids of nine letters and digits only.
    """

    name: str
    open: str
    begin: str
    end: str
    read: Callable[[str, Functions], Calls | None]
    call: tuple[str, str, str] | None = None
    between: str = ""
    listed: bool = False
    nine: bool = False

    @property
    def marks(self) -> set[str]:
        """Texts that tell calls from other text, and may be special tokens."""
        return {self.begin, self.end, "<|python_tag|>"} - {""}

    def response_template(self) -> dict[str, Any]:
        """What transformers' response parser needs to tell calls from other text."""
        calls: dict[str, Any] = {"open_pattern": self.open, "repeats": True, "content": "text"}
        if self.end:
            calls["close"] = self.end
        fields = {"tool_calls": calls, "content": {"content": "text"}}
        return {"start_anchor_pattern": r"\A", "fields": fields}


def detect(template: str) -> Form:
    """Return the form that a chat template shows to its model.

    Example:
        >>> detect("... <tool_call> {{ tool_call | tojson }} </tool_call> ...").name
        'hermes'
    """
    if "<tool_call>" in template:
        return FORMS["qwen_xml" if "<function=" in template else "hermes"]
    if "[TOOL_CALLS]" in template:
        return FORMS["mistral"]
    # Llama's templates speak of "parameters"; all others that show bare JSON of "arguments".
    return FORMS["llama" if re.search(r'"parameters\\?":\s', template) else "json"]


def _no_json(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_json)


def _json_calls(text: str, functions: Functions) -> Calls | None:
    """One call after the other, or a list of them, as JSON."""
    values: list[Any] = []
    rest = text.strip()
    while rest:
        try:
            value, end = _DECODER.raw_decode(rest)
        except (ValueError, RecursionError):
            return None
        values.extend(value if isinstance(value, list) else [value])
        rest = rest[end:].lstrip(" \t\r\n;,")
    calls = [_call(value) for value in values]
    return None if None in calls or not calls else [call for call in calls if call]


def _call(value: Any) -> tuple[str, dict[str, Any]] | None:
    if not isinstance(value, dict):
        return None
    value = value.get("function") if isinstance(value.get("function"), dict) else value
    name, given = value.get("name"), value.get("arguments", value.get("parameters", {}))
    if not isinstance(name, str) or not name.isprintable() or not isinstance(given, dict):
        return None
    return name, given


def _bare_calls(text: str, functions: Functions) -> Calls | None:
    """JSON without a mark is a call only if it names a function that there is."""
    calls = _json_calls(text, functions)
    return calls if calls and all(name in functions for name, _ in calls) else None


def _mistral_calls(text: str, functions: Functions) -> Calls | None:
    """A list of calls, or since 2025 ``name[ARGS]{...}`` each after a mark of its own."""
    if text.lstrip().startswith(("[{", "{")):
        return _json_calls(text, functions)
    calls: Calls = []
    for part in text.split("[TOOL_CALLS]"):
        found = re.fullmatch(
            r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(\{.*)", part, re.DOTALL
        )
        read = found and _json_calls(
            f'{{"name": "{found[1]}", "arguments": {found[2]}}}', functions
        )
        if not read:
            return None
        calls += read
    return calls


_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def _xml_calls(text: str, functions: Functions) -> Calls | None:
    found = re.fullmatch(r"\s*<function=([^>\n]+)>(.*)</function>\s*", text, re.DOTALL)
    if not found:
        return None
    properties = functions.get(found[1], {}).get("properties", {})
    return [(found[1], {k: _typed(v, properties.get(k)) for k, v in _PARAMETER.findall(found[2])})]


def _typed(text: str, schema: Any) -> Any:
    """A value that was written without quotes: text where the schema says so, else JSON if it is."""
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return text
    try:
        return json.loads(text, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return text


_ALL: Sequence[Form] = (
    Form(
        name="hermes",
        open=r"\s*<tool_call>",
        begin="<tool_call>",
        end="</tool_call>",
        read=_json_calls,
        call=('\n{"name": ', ', "arguments": ', "}\n"),
        between="\n",
    ),
    Form(
        name="llama",
        open=r'\A\s*(?:<\|python_tag\|>\s*)?(?=\{\s*"(?:name|type|function)")',
        begin="",
        end="",
        read=_bare_calls,
        call=('{"name": ', ', "parameters": ', "}"),
    ),
    Form(
        name="mistral",
        open=r"\s*\[TOOL_CALLS\]",
        begin="[TOOL_CALLS]",
        end="",
        read=_mistral_calls,
        call=('{"name": ', ', "arguments": ', "}"),
        between=", ",
        listed=True,
        nine=True,
    ),
    Form(
        name="qwen_xml",
        open=r"\s*<tool_call>",
        begin="<tool_call>",
        end="</tool_call>",
        read=_xml_calls,
    ),
    Form(
        name="json",
        open=r'\A\s*(?=(?:\[\s*)?\{\s*"(?:name|type|function)")',
        begin="",
        end="",
        read=_bare_calls,
        call=('{"name": ', ', "arguments": ', "}"),
        between="\n",
    ),
)
FORMS: Mapping[str, Form] = {form.name: form for form in _ALL}
"""The forms by name."""
