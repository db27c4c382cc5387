"""From the text of an answer to its content, its reasoning and its calls, piece by piece."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core_splitfuse.serving.tools.forms import Calls, Form, Functions

if TYPE_CHECKING:
    from transformers.utils.chat_parsing import ResponseParser

_REASONING = {"reasoning_content", "reasoning", "thinking"}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


@dataclass(frozen=True)
class Call:
    """A piece of a call: first its id and name, then its arguments as JSON."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As OpenAI's API has it in ``tool_calls`` of a delta."""
        if not self.id:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        function = {"name": self.name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class Delta:
    """A piece of an answer; one of the three is given."""

    content: str = ""
    reasoning: str = ""
    call: Call | None = None

    def as_dict(self) -> dict[str, Any]:
        """As OpenAI's API has it in ``delta`` of a choice."""
        if self.call is not None:
            return {"tool_calls": [self.call.as_dict()]}
        if self.reasoning:
            return {"reasoning_content": self.reasoning}
        return {"content": self.content}


class Reader:
    """Reads one answer.

    A call is told when it is whole, and text that only looked like one is content: nothing that the
    model wrote is lost, and no broken JSON is told as arguments.

    Args:
        parser: tells calls from other text; without one everything is content.
        form: how calls are written; ``None`` where the parser reads them, too.
        functions: schemas of what may be called.
    """

    def __init__(
        self, parser: ResponseParser | None, form: Form | None, functions: Functions
    ) -> None:
        self._parser = parser
        self._form = form
        self._functions = functions
        self._raw = ""
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[Call] = []

    def feed(self, text: str) -> list[Delta]:
        """Read a further piece of the answer, and return what is certain by now."""
        if self._parser is None:
            return self._told(text)
        if self._form is not None:
            return self._fed(text)
        # A template that cannot read a call loses all that it was given with the call's last letter.
        return _joined([delta for letter in text for delta in self._fed(letter)])

    def _fed(self, text: str) -> list[Delta]:
        if self._parser is None:
            return self._told(text)
        try:
            return self._deltas(self._parser.feed(text), closed=True)
        except ValueError:
            return self._give_up()

    def finish(self) -> list[Delta]:
        """Return what was held back; the answer has ended."""
        if self._parser is None:
            return []
        try:
            return self._deltas(self._parser.finalize()[1], closed=False)
        except ValueError:
            return self._give_up()

    def message(self) -> dict[str, Any]:
        """The whole answer, as OpenAI's API has it in ``message`` of a choice."""
        content = "".join(self._content)
        made: dict[str, Any] = {"role": "assistant", "content": content}
        if self._reasoning:
            made["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            made["content"] = content or None
            made["tool_calls"] = [
                {key: value for key, value in call.as_dict().items() if key != "index"}
                for call in self._calls
            ]
        return made

    def finish_reason(self, reason: str) -> str:
        """Return why the answer ended: for its calls, where there are some and it is whole."""
        return "tool_calls" if reason == "stop" and self._calls else reason

    def _deltas(self, events: Sequence[Mapping[str, Any]], *, closed: bool) -> list[Delta]:
        made: list[Delta] = []
        for event in events:
            kind, field = event["type"], event["field"]
            if kind == "region_open":
                self._raw = ""
            elif kind == "region_chunk" and field == "tool_calls":
                self._raw += event["text"]
            elif kind == "region_chunk":
                made += self._told(event["text"], reasoning=field in _REASONING)
            elif field == "tool_calls":
                made += self._closed(event["value"], closed=closed)
        return made

    def _closed(self, value: Any, *, closed: bool) -> list[Delta]:
        """A call has ended, or with ``closed`` false the answer has."""
        form = self._form
        calls = form.read(value, self._functions) if form else _of_template(value)
        if calls is not None:
            return [delta for name, arguments in calls for delta in self._called(name, arguments)]
        begin, end = (form.begin, form.end) if form else ("", "")
        return self._told(f"{begin}{self._raw}{end if closed else ''}")

    def _called(self, name: str, arguments: Mapping[str, Any]) -> list[Delta]:
        nine = self._form is not None and self._form.nine
        number = "".join(secrets.choice(_LETTERS) for _ in range(9 if nine else 24))
        call = Call(len(self._calls), number if nine else f"call_{number}", name)
        text = _json(arguments)
        self._calls.append(Call(call.index, call.id, name, text))
        return [Delta(call=call), Delta(call=Call(call.index, arguments=text))]

    def _told(self, text: str, *, reasoning: bool = False) -> list[Delta]:
        if not text or (self._calls and not text.strip()):
            return []  # White space around calls belongs to their form.
        if reasoning:
            self._reasoning.append(text)
            return [Delta(reasoning=text)]
        self._content.append(text)
        return [Delta(content=text)]

    def _give_up(self) -> list[Delta]:
        """What the tokenizer's own template cannot read is content from here on."""
        self._parser = None
        return self._told(self._raw)


def _json(arguments: Mapping[str, Any]) -> str:
    text = json.dumps(arguments, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # Half a character, which can be sent escaped only.
        return json.dumps(arguments)
    return text


def _joined(deltas: Sequence[Delta]) -> list[Delta]:
    """Neighbours that continue each other as one."""
    made: list[Delta] = []
    for delta in deltas:
        last = made[-1] if made else None
        if last and last.content and delta.content:
            made[-1] = Delta(content=last.content + delta.content)
        elif last and last.reasoning and delta.reasoning:
            made[-1] = Delta(reasoning=last.reasoning + delta.reasoning)
        else:
            made.append(delta)
    return made


def _of_template(value: Any) -> Calls | None:
    """Calls as transformers' response templates give them."""
    calls: Calls = []
    for item in value if isinstance(value, list) else [value]:
        function = item.get("function", item) if isinstance(item, dict) else {}
        name, arguments = function.get("name"), function.get("arguments", {})
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        calls.append((name, arguments))
    return calls
