"""An inference engine turns prompt ids into text. Each other file in this folder is one `infer_backend`."""

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from luthier.infer.types import Answer, Settings

if TYPE_CHECKING:
    from luthier.config.runs import InferRun
    from luthier.model.files.sources import ModelSource


class Generating(Protocol):
    """A loaded model that answers, one prompt at a time."""

    def stream(self, prompt_ids: Sequence[int], settings: Settings) -> Generator[str, None, Answer]:
        """Yields text as it is generated, in whole characters and without the stop token; returns the whole answer.

        Closing the generator, or an interrupt while waiting for the next piece, stops the generation; the model stays
        ready for the next prompt. Raises `InvalidInput` if the prompt leaves no room for an answer.
        """

    def generate(self, prompt_ids: Sequence[int], settings: Settings) -> Answer:
        """The whole answer at once."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    name: str
    open: "Callable[[InferRun, ModelSource, Any, Collection[int]], Generating]"
    """(run, source of its model, tokenizer, stop ids) -> the loaded model."""
