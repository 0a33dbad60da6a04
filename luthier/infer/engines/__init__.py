"""An inference engine turns prompt ids into text. Each other file in this folder is one `infer_backend`."""

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from luthier.infer.types import Answer, Piece, Settings

if TYPE_CHECKING:
    from luthier.config.runs import InferRun
    from luthier.model.files.sources import ModelSource

Delivery = Piece | Answer | Exception
"""What arrives for a prompt: pieces, and last the answer or the error that ended it."""


class Ticket(Protocol):
    """One prompt that is answered."""

    def pieces(self) -> Iterator[Piece]:
        """Waits for each piece. Raises the error that ended the answer. Only without `deliver`."""

    @property
    def answer(self) -> Answer:
        """After the last piece."""

    def cancel(self) -> None:
        """Ends the answer within one step; nothing is delivered any more. Does nothing after the end."""


class Generating(Protocol):
    """A loaded model that answers many prompts at once."""

    @property
    def num_positions(self) -> int | None:
        """The longest prompt plus answer, in tokens; None without a limit."""

    @property
    def fault(self) -> str | None:
        """Why nothing can be answered any more; None while all is well."""

    def submit(
        self, prompt_ids: Sequence[int], settings: Settings, deliver: "Callable[[Delivery], None] | None" = None
    ) -> Ticket:
        """Asks for an answer and returns at once.

        `deliver` is called in the thread of the model for each piece and last for the answer or the error; it must
        return at once and not raise. Raises `InvalidInput` if the prompt leaves no room for an answer.
        """

    def stream(self, prompt_ids: Sequence[int], settings: Settings) -> Generator[str, None, Answer]:
        """Yields text as it is generated, in whole characters and without the stop token; returns the whole answer.

        Closing the generator, or an interrupt while waiting for the next piece, stops the generation; the model stays
        ready for the next prompt. Raises `InvalidInput` if the prompt leaves no room for an answer.
        """

    def generate(self, prompt_ids: Sequence[int], settings: Settings) -> Answer:
        """The whole answer at once."""

    def close(self) -> None:
        """Ends all answers and the thread of the model."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    name: str
    open: "Callable[[InferRun, ModelSource, Any, Collection[int]], Generating]"
    """(run, source of its model, tokenizer, stop ids) -> the loaded model."""
    program: str = ""
    """What must be installed for it, if it is a program of its own."""
    install: str = ""
    """How to install that."""
