"""The settings of an answer, and the answer."""

from dataclasses import asdict, dataclass
from typing import Literal

from luthier.config.keys.generate import GeneratingConfig

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(GeneratingConfig):
    """How to choose the next tokens: the keys of the run file, and the seed."""

    seed: int | None = None
    """Seed of one answer; None uses the random state of the process."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    text: str
    num_prompt_tokens: int
    num_new_tokens: int
    """Generated tokens, including the one that ended the answer."""
    finish_reason: FinishReason
    """`stop`: the answer ended in an eos token or a stop word of the template; `length`: it was cut off."""
