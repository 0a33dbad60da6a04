"""Canonical examples: every dataset format produces these types, and every training stage consumes them."""

from dataclasses import dataclass, field
from typing import Literal

Role = Literal["user", "assistant", "function", "observation"]
"""`function` is an assistant message that calls tools (JSON of the calls); `observation` is the result of a call."""


LOSS_KEY = "loss"
"""The key of a message (formats sharegpt and openai) with its weight in the loss."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message. The system text is not a message: it belongs to the whole conversation."""

    role: Role
    content: str
    loss: "float | tuple[Span, ...] | None" = None
    """The weight of its tokens in the loss, 0 to 1; None: the keys of the run decide. Spans weight characters."""


@dataclass(frozen=True, slots=True)
class Span:
    """The characters of a message from `start` up to, but not including, `end`."""

    start: int
    end: int
    weight: float


@dataclass(frozen=True, slots=True)
class Media:
    """Paths of images, videos and audio files, in the order of their placeholders in the text."""

    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    audios: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation to train on: user/observation at even positions, assistant/function at odd ones, even length."""

    messages: tuple[Message, ...]
    system: str = ""
    tools: str = ""
    """The list of tools as JSON text, or empty."""
    media: Media = field(default_factory=Media)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that ends with a question (odd length), or a plain text as its single user message (pt)."""

    messages: tuple[Message, ...]
    system: str = ""
    tools: str = ""
    media: Media = field(default_factory=Media)


@dataclass(frozen=True, slots=True)
class Preference:
    """One prompt with a better and a worse answer (ranking data)."""

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    system: str = ""
    tools: str = ""
    media: Media = field(default_factory=Media)


@dataclass(frozen=True, slots=True)
class Feedback:
    """One prompt with an answer that somebody liked or disliked (KTO data)."""

    messages: tuple[Message, ...]
    liked: bool
    system: str = ""
    tools: str = ""
    media: Media = field(default_factory=Media)


Example = Dialogue | Prompt | Preference | Feedback
