"""The bodies of calls: OpenAI's fields, and those that others have added.

A field that nobody here knows is refused, for leaving it out could change the answer. Fields that only
concern OpenAI's own accounting are taken and ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

ANSWERS = 128
"""Answers that one call may ask for, over all its prompts."""

_WIDEST = 2**63
_IDS = 2**31

TokenId = Annotated[int, Field(ge=0, lt=_IDS)]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]


def _listed(given: Any) -> Any:
    """A single text as a list of one."""
    return [given] if isinstance(given, str) else given


class Body(BaseModel):
    """What holds for every body."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """How a stream looks."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Generate(Body):
    """How to answer, in chats and completions alike."""

    model: str
    n: Annotated[int, Field(ge=1, le=ANSWERS)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-_WIDEST, lt=_WIDEST)] | None = None
    stop: Annotated[list[StopString], Field(max_length=16), BeforeValidator(_listed)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    priority: int | None = None
    deadline: Annotated[float, Field(gt=0)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    user: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, given: dict[str, float] | None) -> dict[str, float] | None:
        if given is not None and not all(key.isascii() and key.isdigit() for key in given):
            raise ValueError("keys are token ids")
        if given is not None and len(given) > 1024:
            raise ValueError("at most 1024 tokens")
        return given

    @property
    def wants_usage(self) -> bool:
        """Whether the stream ends with what was used."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(Generate):
    """The body of ``/v1/completions``."""

    prompt: Any
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None
    suffix: Any = None
    add_special_tokens: bool = True

    @field_validator("prompt")
    @classmethod
    def _one_or_many(cls, given: Any) -> list[Any]:
        """Any of the four forms of a prompt, as a list of prompts."""
        if isinstance(given, str):
            return [given]
        if _is_ids(given):
            return [given]
        prompts: list[Any] = given if isinstance(given, list) else []
        texts = all(isinstance(prompt, str) for prompt in prompts)
        if 0 < len(prompts) <= ANSWERS and (texts or all(map(_is_ids, prompts))):
            return prompts
        raise ValueError(f"a text, token ids, or a list of up to {ANSWERS} of these")

    @field_validator("suffix")
    @classmethod
    def _no_suffix(cls, given: Any) -> None:
        if given:
            raise ValueError("the model does not fill in before a suffix")


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message; what else it holds is the chat template's business."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[TextPart] | None = None


class ChatBody(Generate):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeBody(Body):
    """The body of ``/tokenize``."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True


class DetokenizeBody(Body):
    """The body of ``/detokenize``."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=2**20)]


def _is_ids(given: Any) -> bool:
    """Whether this is a list of token ids; an empty one is a prompt without tokens."""
    return isinstance(given, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < _IDS for item in given
    )
