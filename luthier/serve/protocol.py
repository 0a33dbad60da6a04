"""The bodies of requests. A value of the wrong type or out of range is refused, and a field of the wrong name is kept
in `model_extra`, so that the answer can name it as ignored.

A field that is null counts as absent, as in OpenAI's API. Fields that are absent take the value of the run file.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

MAX_DEPTH = 100
"""Levels of nesting in a body."""
MAX_STOPS = 4
_LEAST_INT64, _MOST_INT64 = -(2**63), 2**63 - 1

Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(min_length=1)]
Stops = Annotated[list[Text], Field(max_length=MAX_STOPS)]


class Body(BaseModel):
    """`strict`: "1" is no number. `protected_namespaces`: a field may be called `model`."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Body):
    include_usage: bool | None = None


class SamplingFields(Body):
    """What chat and completions share."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1, le=_MOST_INT64)] | None = None
    min_p: Probability | None = None
    do_sample: bool | None = None
    seed: Annotated[int, Field(ge=_LEAST_INT64, le=_MOST_INT64)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Text | Stops | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_plain(cls, value: Any) -> Any:
        return plain(value)


class FunctionCall(Body):
    name: Text
    arguments: str | dict[str, Any] | None = None
    """JSON text, as OpenAI's API has it, or the object itself."""


class ToolCallField(Body):
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class ContentPart(Body):
    type: Text
    text: str | None = None


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCallField] | None = None
    function_call: FunctionCall | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class FunctionTool(Body):
    name: Text
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def as_given(self) -> dict[str, Any]:
        """With its keys in the order of the request, in which they are written for the model."""
        return self._given

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, value: Any, handler: ModelWrapValidatorHandler["FunctionTool"]) -> "FunctionTool":
        tool = handler(value)
        if isinstance(value, dict):
            tool._given = value
        return tool


class Tool(Body):
    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Body):
    name: Text


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None


TokenIds = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(SamplingFields):
    """POST /v1/completions"""

    prompt: str | TokenIds | Annotated[list[str] | list[TokenIds], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


class ScoreRequest(Body):
    """POST /v1/score/evaluation"""

    model: str | None = None
    messages: Annotated[list[str], Field(min_length=1)]
    max_length: Annotated[int, Field(ge=1, lt=2**31)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_plain(cls, value: Any) -> Any:
        return plain(value)


class TokenizeRequest(Body):
    """POST /tokenize"""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_plain(cls, value: Any) -> Any:
        return plain(value)


class DetokenizeRequest(Body):
    """POST /detokenize"""

    model: str | None = None
    tokens: list[TokenId]


def plain(value: Any) -> Any:
    """`value`, if its texts can be encoded and it is not nested too deeply. Raises `ValueError` otherwise.

    JSON may hold half of a surrogate pair (`"\\ud800"`), which is not a character.
    """
    todo = [(value, 0)]
    while todo:
        part, depth = todo.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"the body is nested more than {MAX_DEPTH} levels deep")
        if isinstance(part, str):
            try:
                part.encode()
            except UnicodeEncodeError as fault:
                raise ValueError(f"a text holds half of a surrogate pair ({fault.object[fault.start]!a})") from None
        elif isinstance(part, Mapping):
            todo += [(child, depth + 1) for pair in part.items() for child in pair]
        elif isinstance(part, list):
            todo += [(child, depth + 1) for child in part]
    return value


def extras(body: Body, prefix: str = "") -> Iterator[str]:
    """The names of fields that this server does not know."""
    yield from (f"{prefix}{name}" for name in body.model_extra or ())
    for name in ("stream_options", "response_format"):
        nested = getattr(body, name) if name in type(body).model_fields else None
        if nested is not None:
            yield from extras(nested, f"{name}.")
    if isinstance(body, ChatRequest | TokenizeRequest):
        keys = body.chat_template_kwargs or {}
        yield from (f"chat_template_kwargs.{key}" for key in keys if key != "enable_thinking")
