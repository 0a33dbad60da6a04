"""The shapes that data takes on its way from a file to a tensor. Every format writes these; every stage reads them."""

from dataclasses import dataclass, field
from typing import Literal

Role = Literal["user", "assistant", "function", "observation"]
"""`function` is an assistant message that calls tools (JSON of the calls); `observation` is what the tools answered."""


LOSS_KEY = "loss"
"""The member of a message, in data of the formats sharegpt and openai, that says how much of the loss it carries."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message. The system text is not a message: it belongs to the whole conversation."""

    role: Role
    content: str
    loss: "float | tuple[Span, ...] | None" = None
    """How much of the loss its tokens carry, 0 to 1; None leaves it to the keys of the run. Spans weigh characters."""


@dataclass(frozen=True, slots=True)
class Span:
    """The characters `start` to below `end` of a message."""

    start: int
    end: int
    weight: float


@dataclass(frozen=True, slots=True)
class Media:
    """Paths of pictures, films and sounds, in the order of their placeholders in the text."""

    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    audios: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation to learn from: user/observation at even positions, assistant/function at odd ones, even length."""

    messages: tuple[Message, ...]
    system: str = ""
    tools: str = ""
    """JSON text of the list of tools, or empty."""
    media: Media = field(default_factory=Media)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that waits for an answer (odd length), or a plain text as its single user message (pt)."""

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
