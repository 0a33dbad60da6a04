"""The model that a server serves: one that writes answers, or one that scores texts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from luthier.core.errors import DeviceFailed, InvalidInput
from luthier.infer.engines import Generating
from luthier.infer.prompting import ModelTemplatePrompting, Prompting, TemplatePrompting
from luthier.infer.reading import TAIL_TOKENS, opens_thought
from luthier.infer.types import Settings
from luthier.model.tokenizer import special_texts
from luthier.serve.convert import Asked, require_turns
from luthier.serve.errors import ApiError
from luthier.serve.images import ImageRules
from luthier.serve.token_texts import TokenTexts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class ServedModel(ABC):
    """What routes need to know about the model."""

    name: str
    tokenizer: "PreTrainedTokenizerBase"
    texts: TokenTexts
    num_positions: int | None
    """The longest sequence that the model takes; None without a limit."""
    vocab_size: int
    """The width of the logits."""
    created: int
    """Seconds since 1970."""

    @property
    @abstractmethod
    def fault(self) -> str | None:
        """Why it answers nothing any more; None while all is well."""


@dataclass(frozen=True, kw_only=True)
class ChatModel(ServedModel):
    engine: Generating
    prompting: Prompting
    settings: Settings
    """Of the run file."""
    call_syntax: str
    thinking_tags: tuple[str, str] | None
    """None: answers have no thoughts."""
    images: ImageRules | None = None
    """Which media requests may have; None for a model that reads text only."""

    @property
    def fault(self) -> str | None:
        return self.engine.fault

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """The texts of tokens that `skip_special_tokens` leaves out."""
        return special_texts(self.tokenizer)

    def with_special_stops(self, settings: Settings) -> Settings:
        """A stop text that is a special token ends the answer as a token, since `skip_special_tokens` leaves its text
        out."""
        named = [text for text in settings.stop if text in self.special_tokens]
        ids: Any = map(self.tokenizer.convert_tokens_to_ids, named)
        return replace(settings, stop_token_ids=(*settings.stop_token_ids, *ids))

    def prompt_ids(self, asked: Asked, tools: str, enable_thinking: bool | None) -> list[int]:
        """Raises `ApiError` for a conversation that the chat format cannot write, or that is too long.

        `enable_thinking` None: as the run file has it.
        """
        prompting = self.prompting if enable_thinking is None else _thinking(self.prompting, enable_thinking)
        if isinstance(prompting, TemplatePrompting):
            require_turns(asked.messages)
        try:
            ids = _prompt_ids(prompting, asked, tools)
        except InvalidInput as fault:
            raise ApiError(str(fault), param=_at_fault(prompting, asked, tools)) from fault
        if asked.begun:
            ids += _encoded(prompting, asked.begun)
        return ids

    def opens_thought(self, prompt_ids: Sequence[int]) -> bool:
        """Whether the answer begins inside a thought that the prompt has opened."""
        return opens_thought(str(self.tokenizer.decode(list(prompt_ids[-TAIL_TOKENS:]))), self.thinking_tags)


@dataclass(frozen=True, kw_only=True)
class RewardModel(ServedModel):
    scores: Callable[[Sequence[Sequence[int]]], list[float]]
    """Token ids of texts -> their scores. Slow: call it in a thread. Raises `DeviceFailed`."""
    failures: list[DeviceFailed] = field(default_factory=list)
    """Those that `scores` has raised."""

    @property
    def fault(self) -> str | None:
        return str(self.failures[0]) if self.failures else None


def _prompt_ids(prompting: Prompting, asked: Asked, tools: str) -> list[int]:
    if asked.items:
        return prompting.seen_prompt(asked.messages, asked.system, tools, asked.items)
    return prompting.prompt_ids(asked.messages, asked.system, tools)


def _at_fault(prompting: Prompting, asked: Asked, tools: str) -> str:
    """The field because of which a prompt cannot be written: the tools, if it can be without them."""
    if not tools:
        return "messages"
    try:
        _prompt_ids(prompting, asked, "")
    except InvalidInput:
        return "messages"
    return "tools"


Loaded = tuple[ChatModel | RewardModel, Callable[[], None]]
"""A model, and what releases it."""


def _thinking(prompting: Prompting, enable_thinking: bool) -> Prompting:
    if isinstance(prompting, TemplatePrompting):
        return replace(prompting, enable_thinking=enable_thinking)
    if isinstance(prompting, ModelTemplatePrompting):
        program = replace(prompting.model_template, enable_thinking=enable_thinking)
        return replace(prompting, model_template=program)
    return prompting


def _encoded(prompting: Prompting, text: str) -> list[int]:
    encoder = prompting.encoder if isinstance(prompting, TemplatePrompting) else None
    if isinstance(prompting, ModelTemplatePrompting):
        encoder = prompting.model_template.encoder
    assert encoder is not None
    return encoder.text(text)
