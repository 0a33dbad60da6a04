"""Canonical examples: every dataset format produces these types, and every training stage consumes them."""

from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["user", "assistant", "function", "observation"]
"""`function` is an assistant message that calls tools (JSON of the calls); `observation` is the result of a call."""


ASKING: tuple[Role, ...] = ("user", "observation")
ANSWERING: tuple[Role, ...] = ("assistant", "function")
LOSS_KEY = "loss"
"""The key of a message (formats sharegpt and openai) with its weight in the loss."""


RESULT_JOINER = "\n</tool_response>\n<tool_response>\n"
"""Between the results of several calls where they are one text, as named formats write them."""
PLACE, VIDEO_PLACE, AUDIO_PLACE = "\ufdd0", "\ufdd3", "\ufdd4"
"""Stand for an image, a video and audio in the text of a message. Unicode keeps these characters for programs; no
tokenizer sees them."""
PLACES = (PLACE, VIDEO_PLACE, AUDIO_PLACE)
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys under which servers and other tools give the thought of an answer apart from its content."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: dict[str, Any]
    id: str = ""
    """As the data give it; empty if they give none."""


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What one call returned."""

    content: str
    call_id: str = ""
    """The id of the call that it answers; empty if the data give none."""
    name: str = ""
    """The name of the tool; empty if the data give none."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message. The system text is not a message: it belongs to the whole conversation."""

    role: Role
    content: str
    """For a function message without `calls` the JSON of its calls, else the text beside them. For an observation with
    several `results` their texts, joined as the named formats write them."""
    loss: "float | tuple[Span, ...] | None" = None
    """The weight of its tokens in the loss, 0 to 1; None: the keys of the run decide. Spans weight characters of
    `content`."""
    thought: str = ""
    """What the data give apart from the content, under a key such as `reasoning_content`; without thinking tags."""
    calls: tuple[ToolCall, ...] = ()
    """The calls of a function message, if the data give them as objects (`tool_calls`) and not as text."""
    results: tuple[ToolResult, ...] = ()
    """The results in an observation, if the data give each as a message of its own."""


@dataclass(frozen=True, slots=True)
class Span:
    """The characters of a message from `start` up to, but not including, `end`."""

    start: int
    end: int
    weight: float


@dataclass(frozen=True, slots=True)
class Media:
    """Images, videos and audio files, in the order of their places in the text (`luthier.data.media.items`)."""

    items: tuple[str, ...] = ()
    """The path of an image; the kind of another one before its path: `audio:/a/b.wav`."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation to train on: user/observation at even positions, assistant/function at odd ones, even length."""

    messages: tuple[Message, ...]
    system: str | None = None
    """None if the data give none, so that the default of the chat format applies; an empty text stays empty."""
    tools: str = ""
    """The list of tools as JSON text, or empty."""
    media: Media = field(default_factory=Media)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that ends with a question (odd length), or a plain text as its single user message (pt)."""

    messages: tuple[Message, ...]
    system: str | None = None
    tools: str = ""
    media: Media = field(default_factory=Media)


@dataclass(frozen=True, slots=True)
class Preference:
    """One prompt with a better and a worse answer (ranking data)."""

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    system: str | None = None
    tools: str = ""
    media: Media = field(default_factory=Media)


@dataclass(frozen=True, slots=True)
class Feedback:
    """One prompt with an answer that somebody liked or disliked (KTO data)."""

    messages: tuple[Message, ...]
    liked: bool
    system: str | None = None
    tools: str = ""
    media: Media = field(default_factory=Media)


Example = Dialogue | Prompt | Preference | Feedback
