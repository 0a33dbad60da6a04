"""The settings of an answer, the pieces in which it arrives, and the answer."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from luthier.config.keys.generate import GeneratingConfig
from luthier.core.errors import InvalidInput

FinishReason = Literal["stop", "length"]


class UnsupportedSetting(InvalidInput):
    """A setting that the engine cannot fulfil. `name`: of the field of `Settings`."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name


class GrammarFault(InvalidInput):
    """A grammar that cannot be held, or a text that has left it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(GeneratingConfig):
    """How to choose the next tokens of one answer: the keys of the run file, and what a caller may add."""

    seed: int | None = None
    """Seed of one answer; None uses the random state of the process."""
    min_p: float | None = None
    """Leaves out tokens with less than this share of the probability of the most likely token. None: the value in the
    model's generation_config.json, if it has one."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the answer already has (OpenAI's formula, -2 to 2)."""
    frequency_penalty: float = 0.0
    """The same, times the number of times that the answer has it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    stop: tuple[str, ...] = ()
    """The answer ends where one of these begins in its text."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer, beside those of the model."""
    ignore_eos: bool = False
    """Whether the model's own end tokens are ordinary tokens."""
    num_logprobs: int | None = None
    """How many alternatives are reported with each token; 0 for the token alone, None for no log-probabilities."""
    prompt_logprobs: bool = False
    """Whether the tokens of the prompt are scored too. Needs `num_logprobs`."""
    grammar: str | None = None
    """A Lark grammar or a JSON schema of llguidance, from `luthier.infer.grammar`, that the answer must follow."""

    @classmethod
    def of(cls, generating: GeneratingConfig, seed: int | None = None) -> "Settings":
        return cls(**asdict(generating), seed=seed)

    @property
    def is_greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0

    def num_new_tokens(self, num_prompt_tokens: int, num_positions: int | None) -> int:
        """The maximum length of the answer to a prompt; zero or less means that there is no room.

        `num_positions` is the maximum sequence length of the model, None without a limit.
        """
        room = self.max_new_tokens if self.max_new_tokens > 0 else self.max_length - num_prompt_tokens
        return room if num_positions is None else min(room, num_positions - num_prompt_tokens)


@dataclass(frozen=True, slots=True)
class Token:
    """A token of an answer or a prompt."""

    id: int
    logprob: float | None = None
    """The natural logarithm of its probability, from the raw logits in float32. None if it was not asked for, and for
    the first token of a prompt."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens at its place with their log-probabilities, best first."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What an answer gained: text in whole characters, and the tokens since the last piece. Text may be empty."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    text: str
    num_prompt_tokens: int
    num_new_tokens: int
    """Generated tokens, including the one that ended the answer."""
    finish_reason: FinishReason
    """`stop`: the answer ended in an end token or at a stop string; `length`: it was cut off."""
    tokens: tuple[Token, ...] = ()
    """The generated tokens, including the one that ended the answer."""
    prompt_tokens: tuple[Token, ...] = ()
    """Those of the prompt, if `prompt_logprobs` asks for them."""
