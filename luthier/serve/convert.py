"""From the messages of a request to those that a chat format writes, and to the tools as JSON text.

A system text belongs to the whole conversation here, so system and developer messages stand at its beginning. The
results of several calls follow each other and become one observation.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.data.chat.parts import has_place
from luthier.data.media.kinds import media_kind
from luthier.data.types import ASKING, RESULT_JOINER, Message, ToolCall, ToolResult
from luthier.serve.errors import ApiError
from luthier.serve.images import ImageRules, is_on_the_web
from luthier.serve.protocol import ChatMessage, ContentPart, FunctionCall, Tool, plain

_SYSTEM_ROLES, _RESULT_ROLES = ("system", "developer"), ("tool", "function")
_MEDIA_PARTS = {
    **dict.fromkeys(("image_url", "input_image"), "image"),
    **dict.fromkeys(("video_url", "input_video"), "video"),
    **dict.fromkeys(("audio_url", "input_audio"), "audio"),
}
"""Type of a part -> kind of media."""
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_SYSTEM_JOINER = "\n\n"
_TOOL_KEYS_OF_THE_API = ("strict",)
"""Keys of a function that are meant for the server and not for the model."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A conversation in luthier's terms."""

    messages: tuple[Message, ...]
    system: str | None
    """None if there is no system message."""
    begun: str | None = None
    """The beginning of the answer, for `continue_final_message`."""
    items: tuple[str, ...] = ()
    """All images, videos and audio, in the order of their places in the messages."""


@dataclass(slots=True)
class _MediaSoFar:
    """The media of a conversation, as its messages are read."""

    rules: ImageRules | None
    """None: the model reads text only."""
    items: list[str] = field(default_factory=list)

    def place(self, part: ContentPart, where: str) -> str:
        """What stands for the item of this part in its message. Raises `ApiError`."""
        if self.rules is None:
            raise ApiError(f"{where}: this model takes text only, no part of type {part.type[:40]!r}", param=where)
        kind = media_kind(_MEDIA_PARTS[part.type])
        key, url = _address(part)
        if not isinstance(url, str) or not url:
            needs = "data" if key == "input_audio" else "url"
            raise ApiError(f"{where}.{key}: this field is required, as an object with {needs}", param=where)
        self.items.append(self.rules.item_of(url, kind, where))
        return kind.place


def _address(part: ContentPart) -> tuple[str, Any]:
    """The key of a part with media, and what it names: text, if the request is right."""
    key = part.type if part.type == "input_audio" else f"{_MEDIA_PARTS[part.type]}_url"
    given = (part.model_extra or {}).get(key)
    if not isinstance(given, dict):
        return key, given
    if key == "input_audio" and isinstance(given.get("data"), str):
        return key, f"data:audio;base64,{given['data']}"
    return key, given.get("url")


def web_addresses(messages: Sequence[ChatMessage]) -> list[str]:
    """The addresses on the web that these messages name, each once."""
    parts = [part for message in messages if isinstance(message.content, list) for part in message.content]
    found = [_address(part)[1] for part in parts if part.type in _MEDIA_PARTS]
    return list(dict.fromkeys(url for url in found if isinstance(url, str) and is_on_the_web(url)))


def conversation(messages: Sequence[ChatMessage], *, continues: bool = False, rules: ImageRules | None = None) -> Asked:
    """Raises `ApiError` that names the message at fault. `continues`: the last message is the answer's beginning.

    `rules`: which media questions may have; None for a model that reads text only.
    """
    media = _MediaSoFar(rules)
    num_system = next((i for i, message in enumerate(messages) if message.role not in _SYSTEM_ROLES), len(messages))
    system = [text_of(message, f"messages[{i}]") for i, message in enumerate(messages[:num_system])]
    rest = list(enumerate(messages))[num_system:]
    begun = None
    if continues:
        if not rest or rest[-1][1].role != "assistant" or rest[-1][1].tool_calls:
            raise ApiError(
                "continue_final_message: the last message is not a text of the assistant",
                param="continue_final_message",
            )
        index, last = rest.pop()
        begun = text_of(last, f"messages[{index}]")
    if not rest:
        raise ApiError("messages: there is no question, only a system text", param="messages")
    spoken: list[Message] = []
    for index, message in rest:
        place = f"messages[{index}]"
        if message.role in _SYSTEM_ROLES:
            raise ApiError(f"{place}: a {message.role} message can only stand at the beginning", param=f"{place}.role")
        if message.role in _RESULT_ROLES:
            _add_result(spoken, message, place, media)
        elif message.role == "user":
            spoken.append(Message("user", text_of(message, place, media)))
        else:
            spoken.append(_assistant(message, place))
    return Asked(tuple(spoken), _SYSTEM_JOINER.join(system) if system else None, begun, tuple(media.items))


def require_turns(messages: Sequence[Message]) -> None:
    """A chat format with slots writes questions and answers in turn. Raises `ApiError` where they are not."""
    for index, message in enumerate(messages):
        asks = message.role in ASKING
        if asks != (index % 2 == 0):
            want = "a question or the result of a tool" if index % 2 == 0 else "an answer of the assistant"
            raise ApiError(
                f"messages: the chat format of this model writes questions and answers in turn, so {want} should"
                f" come where {_in_words(message)} is (turn {index + 1})",
                param="messages",
            )
    if len(messages) % 2 == 0:
        raise ApiError(
            "messages: the last message is an answer of the assistant, and there is no question after it"
            " -> add one, or set continue_final_message: true",
            param="messages",
        )


def tools_text(tools: Sequence[Tool] | None) -> str:
    """The tools as JSON text, as they are given; empty if there are none."""
    if not tools:
        return ""
    return json.dumps([_tool(tool) for tool in tools], ensure_ascii=False)


def text_of(message: ChatMessage, place: str, media: _MediaSoFar | None = None) -> str:
    """The text of a message; parts are joined as in training. `media` takes its media; without it, there may be none.

    Raises `ApiError` for a part that the message cannot have.
    """
    content = message.content
    if content is None:
        if message.role == "assistant":
            return ""
        raise ApiError(f"{place}.content: this field is required", param=f"{place}.content")
    if isinstance(content, str):
        return _plain(content, f"{place}.content")
    texts = []
    for number, part in enumerate(content):
        where = f"{place}.content[{number}]"
        if part.type in _MEDIA_PARTS and media is not None:
            texts.append(media.place(part, where))
            continue
        if part.type not in _TEXT_PARTS:
            raise ApiError(f"{where}: there can be no part of type {part.type[:40]!r} here", param=where)
        text = (part.model_extra or {}).get("refusal") if part.type == "refusal" else part.text
        if not isinstance(text, str):
            raise ApiError(f"{where}.text: this field is required", param=f"{where}.text")
        texts.append(_plain(text, f"{where}.text"))
    return "".join(texts)


def _plain(text: str, place: str) -> str:
    if has_place(text):
        reason = "it holds a character that Unicode keeps for programs (U+FDD0 to U+FDD4)"
        raise ApiError(f"{place}: {reason}", param=place)
    return text


def _assistant(message: ChatMessage, place: str) -> Message:
    text, thought = text_of(message, place), message.reasoning_content or message.reasoning or ""
    calls = [
        _call(call.function, call.id or "", f"{place}.tool_calls[{number}].function")
        for number, call in enumerate(message.tool_calls or ())
    ]
    if message.function_call is not None:
        calls.append(_call(message.function_call, "", f"{place}.function_call"))
    if not calls:
        return Message("assistant", text, thought=thought)
    return Message("function", text, thought=thought, calls=tuple(calls))


def _call(function: FunctionCall, call_id: str, place: str) -> ToolCall:
    """`arguments` may be JSON text or the object itself."""
    arguments: Any = function.arguments
    param = f"{place}.arguments"
    if isinstance(arguments, str):
        try:
            arguments = plain(json.loads(arguments)) if arguments.strip() else {}
        except (ValueError, RecursionError) as fault:
            raise ApiError(f"{param}: this is not valid JSON ({fault})", param=param) from fault
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ApiError(f"{param}: this is no JSON object", param=param)
    return ToolCall(function.name, arguments, call_id)


def _add_result(spoken: list[Message], message: ChatMessage, place: str, media: _MediaSoFar) -> None:
    result = ToolResult(text_of(message, place, media), message.tool_call_id or "", message.name or "")
    if spoken and spoken[-1].role == "observation":
        before = spoken.pop()
        results = (*before.results, result)
        spoken.append(Message("observation", RESULT_JOINER.join(r.content for r in results), results=results))
    else:
        spoken.append(Message("observation", result.content, results=(result,)))


def _tool(tool: Tool) -> dict[str, Any]:
    given = tool.function.as_given
    kept = {k: v for k, v in given.items() if k not in _TOOL_KEYS_OF_THE_API and v is not None}
    return {"type": "function", "function": kept}


def _in_words(message: Message) -> str:
    kinds = {"user": "a question", "observation": "the result of a tool"}
    return kinds.get(message.role, "an answer of the assistant")
