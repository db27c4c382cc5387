"""The functions that a request offers, and which of them it wants called."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from core.errors import EngineError
from core_splitfuse.serving.structured import json_grammar
from core_splitfuse.serving.tools.forms import Functions

MOST_TOOLS = 128
"""Functions that a request may offer."""

_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def read_functions(tools: Sequence[Mapping[str, object]]) -> dict[str, Mapping[str, Any]]:
    """Return the JSON schema of the arguments of every function, by its name.

    Args:
        tools: as in OpenAI's API.

    Raises:
        EngineError: for what is no function, has no proper name or schema, or comes twice.
    """
    if len(tools) > MOST_TOOLS:
        raise EngineError(f"{len(tools)} tools are too many", why=f"at most {MOST_TOOLS} are taken")
    functions: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
            raise EngineError("a tool is no function", why="only functions are known")
        name = function.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,64}", name):
            fix = "take 1 to 64 letters, digits, dots, dashes and underscores"
            raise EngineError(f"{name!r} is no name of a function", fix=fix)
        if name in functions:
            raise EngineError(f"two tools are called {name!r}")
        schema = function.get("parameters") or _NO_ARGUMENTS
        json_grammar(schema, f"the parameters of {name}")
        if not isinstance(schema, Mapping):
            raise EngineError(f"the parameters of {name} are no JSON schema of an object")
        functions[name] = schema
    return functions


def read_choice(choice: object, functions: Functions) -> list[str]:
    """Return the functions of which one has to be called; none where none has to.

    Args:
        choice: ``tool_choice`` as in OpenAI's API.
        functions: what is offered.

    Raises:
        EngineError: for an unknown choice, and one of what is not offered.
    """
    if choice in (None, "auto", "none"):
        return []
    if choice == "required":
        if not functions:
            raise EngineError("tool_choice is required", why="the request has no tools")
        return list(functions)
    named = choice.get("function") if isinstance(choice, Mapping) else None
    name = named.get("name") if isinstance(named, Mapping) else None
    if not isinstance(name, str):
        fix = "it is none, auto, required or a function by name"
        raise EngineError("tool_choice is unknown", fix=fix)
    if name not in functions:
        raise EngineError(f"tool_choice names {name!r}", why="there is no such tool")
    return [name]
