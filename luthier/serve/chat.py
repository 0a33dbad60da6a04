"""POST /v1/chat/completions: from a request to answers, whole or as a stream of chunks."""

import json
import re
import secrets
import string
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from luthier.data.types import ToolCall
from luthier.infer.reading import AnswerFormat, AnswerReader, CallReader, Part, Thought, Words
from luthier.infer.types import Answer, Settings, Token
from luthier.serve.answers import Answers, Job
from luthier.serve.convert import conversation, tools_text
from luthier.serve.errors import ApiError
from luthier.serve.events import event
from luthier.serve.forced import called, forced_grammar
from luthier.serve.logprobs import chat_logprobs
from luthier.serve.model import ChatModel
from luthier.serve.protocol import ChatMessage, ChatRequest, Tool
from luthier.serve.settings import chat_settings, of_choice


@dataclass(frozen=True, slots=True)
class Chat:
    """A request that has been checked."""

    request: ChatRequest
    model: ChatModel
    prompt_ids: list[int]
    settings: Settings
    is_thinking: bool
    """The prompt has opened the thought of the answer."""
    tools: tuple[Any, ...]
    """Empty if the answer may not call any."""
    hidden: re.Pattern[str] | None
    """Special tokens that are read, since they are tags of calls or thoughts, and left out of the text afterwards."""
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def num_choices(self) -> int:
        return self.request.n or 1

    @property
    def jobs(self) -> list[Job]:
        forced = "tool_choice" if called(self.request) else "response_format"
        return [Job(self.prompt_ids, of_choice(self.settings, k), "messages", forced) for k in range(self.num_choices)]


def prepared(request: ChatRequest, model: ChatModel) -> Chat:
    """Raises `ApiError` for whatever is wrong with the request. Slow for long texts."""
    allowed = None if request.tool_choice == "none" else request.tools
    grammar = forced_grammar(request, model.call_syntax, model.special_tokens)
    settings = model.with_special_stops(chat_settings(request, model.settings, model.vocab_size, grammar))
    keys = request.chat_template_kwargs or {}
    if grammar is not None and model.thinking_tags is not None:
        keys = {"enable_thinking": False, **keys}  # a grammar holds from the first token on
    continues = bool(request.continue_final_message)
    prompt_ids = prompt_of(model, request.messages, allowed, keys, continues=continues)
    is_thinking = grammar is None and not continues and model.opens_thought(prompt_ids)
    tools = tuple(json.loads(tools_text(allowed))) if allowed else ()
    hidden = _hidden(model, settings, has_tools=bool(tools))
    if hidden is not None:
        settings = replace(settings, skip_special_tokens=False)
    return Chat(request, model, prompt_ids, settings, is_thinking, tools, hidden)


def _hidden(model: ChatModel, settings: Settings, *, has_tools: bool) -> re.Pattern[str] | None:
    """Matches special tokens, if some of them must be read although the answer is to have none."""
    if not settings.skip_special_tokens:
        return None
    return AnswerFormat(model.thinking_tags, model.call_syntax).hidden(model.special_tokens, has_tools=has_tools)


def prompt_of(
    model: ChatModel,
    messages: Sequence[ChatMessage],
    tools: Sequence[Tool] | None,
    template_keys: dict[str, Any] | None,
    *,
    continues: bool = False,
) -> list[int]:
    """The prompt ids of a conversation. Raises `ApiError`."""
    enable_thinking = (template_keys or {}).get("enable_thinking")
    if enable_thinking is not None and not isinstance(enable_thinking, bool):
        param = "chat_template_kwargs.enable_thinking"
        raise ApiError(f"{param}: should be true or false", param=param)
    asked = conversation(messages, continues=continues, rules=model.images)
    return model.prompt_ids(asked, tools_text(tools), enable_thinking)


class Choice:
    """One answer as it grows."""

    def __init__(self, chat: Chat, index: int) -> None:
        self.index = index
        calls = CallReader(chat.model.call_syntax, chat.tools) if chat.tools else None
        tags = chat.model.thinking_tags if chat.settings.grammar is None else None
        self._reader = AnswerReader(tags, is_thinking=chat.is_thinking, calls=calls)
        self._hidden = chat.hidden
        self._one_call = chat.request.parallel_tool_calls is False
        self.thoughts: list[str] = []
        self.words: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.num_new_tokens = 0
        self.finish_reason: str | None = None

    def push(self, text: str) -> Iterator[dict[str, Any]]:
        """The deltas that this text adds."""
        yield from self._deltas(self._reader.push(text))

    def finish(self, reason: str) -> Iterator[dict[str, Any]]:
        yield from self._deltas(self._reader.finish())
        self.finish_reason = "tool_calls" if self.calls and reason == "stop" else reason

    @property
    def has_enough(self) -> bool:
        """Whether the one call that may be made has been made."""
        return self._one_call and bool(self.calls)

    def message(self) -> dict[str, Any]:
        content = "".join(self.words)
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if self.calls else "")}
        if self.thoughts:
            message["reasoning_content"] = "".join(self.thoughts)
        if self.calls:
            message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in self.calls]
        return message

    def _shown(self, text: str) -> str:
        return text if self._hidden is None else self._hidden.sub("", text)

    def _deltas(self, parts: Sequence[Part]) -> Iterator[dict[str, Any]]:
        for part in parts:
            if self.has_enough:
                return
            match part:
                case Thought(text) if shown := self._shown(text):
                    self.thoughts.append(shown)
                    yield {"reasoning_content": shown}
                case Words(text) if shown := self._shown(text):
                    self.words.append(shown)
                    yield {"content": shown}
                case ToolCall():
                    self.calls.append(_call(part, len(self.calls)))
                    yield {"tool_calls": [self.calls[-1]]}


async def whole(chat: Chat, answers: Answers) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    choices = [Choice(chat, index) for index in range(chat.num_choices)]
    tokens: list[list[Token]] = [[] for _ in choices]
    async for number, item in answers:
        choice = choices[number]
        if isinstance(item, Answer):
            choice.num_new_tokens = item.num_new_tokens
            tokens[number] = list(item.tokens)
            for _ in choice.finish(item.finish_reason):
                pass
            continue
        tokens[number] += item.tokens
        for _ in choice.push(item.text):
            pass
        if choice.has_enough:
            choice.num_new_tokens = len(tokens[number])
            choice.finish_reason = "tool_calls"
            answers.cancel(number)
    listed = []
    for choice, made in zip(choices, tokens, strict=True):
        one: dict[str, Any] = {"index": choice.index, "message": choice.message()}
        one["logprobs"] = chat_logprobs(made, chat.model.texts) if chat.request.logprobs else None
        one["finish_reason"] = choice.finish_reason
        if chat.request.return_token_ids:
            one["token_ids"] = [token.id for token in made]
        listed.append(one)
    body = {**_head(chat, "chat.completion"), "choices": listed, "usage": _usage(chat, choices)}
    return body | ({"prompt_token_ids": chat.prompt_ids} if chat.request.return_token_ids else {})


async def events(chat: Chat, answers: Answers) -> AsyncGenerator[bytes]:
    """The events of a stream, without the end mark."""
    choices = [Choice(chat, index) for index in range(chat.num_choices)]
    chunks = _Chunks(chat)
    for choice in choices:
        yield chunks.opening(choice.index)
    async for number, item in answers:
        choice = choices[number]
        if isinstance(item, Answer):
            choice.num_new_tokens = item.num_new_tokens
            deltas = choice.finish(item.finish_reason)
        else:
            choice.num_new_tokens += len(item.tokens)
            chunks.add(number, item.tokens)
            deltas = choice.push(item.text)
        for delta in deltas:
            yield chunks.delta(number, delta)
        if choice.has_enough and choice.finish_reason is None:
            choice.finish_reason = "tool_calls"
            answers.cancel(number)
        if choice.finish_reason is not None:
            yield chunks.end(number, choice.finish_reason)
    if chunks.has_usage:
        yield event({**_head(chat, "chat.completion.chunk"), "choices": [], "usage": _usage(chat, choices)})


class _Chunks:
    """Writes the chunks of one stream. Tokens wait for the next chunk of their choice."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._waiting: list[list[Token]] = [[] for _ in range(chat.num_choices)]
        options = chat.request.stream_options
        self.has_usage = bool(options and options.include_usage)

    def add(self, number: int, tokens: Sequence[Token]) -> None:
        self._waiting[number] += tokens

    def opening(self, number: int) -> bytes:
        more = {"prompt_token_ids": self._chat.prompt_ids} if self._chat.request.return_token_ids and not number else {}
        return self._chunk(number, {"role": "assistant", "content": ""}, None, more)

    def delta(self, number: int, delta: dict[str, Any]) -> bytes:
        return self._chunk(number, delta, None)

    def end(self, number: int, reason: str) -> bytes:
        return self._chunk(number, {}, reason)

    def _chunk(
        self, number: int, delta: dict[str, Any], reason: str | None, more: dict[str, Any] | None = None
    ) -> bytes:
        tokens, self._waiting[number] = self._waiting[number], []
        choice: dict[str, Any] = {"index": number, "delta": delta, "logprobs": None, "finish_reason": reason}
        if self._chat.request.logprobs and tokens:
            choice["logprobs"] = chat_logprobs(tokens, self._chat.model.texts)
        if self._chat.request.return_token_ids and "role" not in delta:
            choice["token_ids"] = [token.id for token in tokens]
        chunk = {**_head(self._chat, "chat.completion.chunk"), "choices": [choice], **(more or {})}
        return event(chunk | ({"usage": None} if self.has_usage else {}))


def _head(chat: Chat, kind: str) -> dict[str, Any]:
    return {"id": chat.id, "object": kind, "created": chat.created, "model": chat.model.name}


def _usage(chat: Chat, choices: Sequence[Choice]) -> dict[str, int]:
    return usage(len(chat.prompt_ids), sum(choice.num_new_tokens for choice in choices))


def usage(num_prompt_tokens: int, num_new_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_new_tokens,
        "total_tokens": num_prompt_tokens + num_new_tokens,
    }


def _call(call: ToolCall, index: int) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    function = {"name": call.name, "arguments": arguments}
    return {"index": index, "id": _call_id(), "type": "function", "function": function}


def _call_id() -> str:
    """Nine letters and digits, the only form that the chat templates of some models accept when it comes back."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
