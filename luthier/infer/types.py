"""What goes into an answer and what comes out of one."""

from dataclasses import asdict, dataclass
from typing import Literal

from luthier.config.keys.generate import GeneratingConfig

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(GeneratingConfig):
    """How to choose the next tokens: the keys of the run file, and where random numbers start."""

    seed: int | None = None
    """Start of the random numbers of one answer; None goes on with whatever the process has."""

    @classmethod
    def of(cls, generating: GeneratingConfig, seed: int | None = None) -> "Settings":
        return cls(**asdict(generating), seed=seed)

    @property
    def is_greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0

    def num_new_tokens(self, num_prompt_tokens: int, num_positions: int | None) -> int:
        """How long the answer to a prompt may get, at most; zero or less means that there is no room for one.

        `num_positions` is the longest sequence the model was built for, None if it knows no limit.
        """
        room = self.max_new_tokens if self.max_new_tokens > 0 else self.max_length - num_prompt_tokens
        return room if num_positions is None else min(room, num_positions - num_prompt_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    text: str
    num_prompt_tokens: int
    num_new_tokens: int
    """Tokens generated, the one that ended the answer included."""
    finish_reason: FinishReason
    """`stop`: the model ended its turn, by its eos token or a stop word of the template; `length`: it was cut off."""
