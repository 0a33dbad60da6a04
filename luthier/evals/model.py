"""The model that is measured: loaded weights with their tokenizer and chat format, ready to score and to answer."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from luthier.data.rows.encoding import Encoding
from luthier.data.types import Message, ToolCall
from luthier.infer.prompting import Prompting
from luthier.infer.prompting import with_calls as split_calls
from luthier.infer.reading import TAIL_TOKENS, AnswerFormat, AnswerReader, Thought, Words, opens_thought
from luthier.infer.stops import before_stop
from luthier.infer.types import Settings
from luthier.model.tokenizer import special_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from luthier.evals.scorer import Scorer


@dataclass(frozen=True, slots=True)
class Asked:
    """A conversation that waits for its next answer."""

    messages: tuple[Message, ...]
    system: str | None = None
    tools: str = ""
    """JSON text, or empty."""


@dataclass(frozen=True, slots=True)
class Read:
    """The parts of an answer."""

    thought: str
    words: str
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class EvalModel:
    model: "PreTrainedModel"
    """In evaluation mode, with the adapters of the run."""
    tokenizer: "PreTrainedTokenizerBase"
    encoding: Encoding
    """How training makes rows."""
    prompting: Prompting
    """How conversations are written for an answer."""
    stop_ids: frozenset[int]
    answer_format: AnswerFormat
    """How the model writes thoughts and calls."""
    settings: Settings
    """How answers are generated, as the run file says."""
    batch_size: int
    fast_path: bool
    """Whether answers take faster ways to the same numbers, up to rounding."""

    @cached_property
    def scorer(self) -> "Scorer":
        from luthier.evals.scorer import Scorer

        return Scorer(self.model, self.batch_size)

    @property
    def num_positions(self) -> int | None:
        """The longest sequence that the model takes; None without a limit."""
        from luthier.infer.decoding import num_positions

        return num_positions(self.model)

    def prompt_ids(self, asked: Asked) -> list[int]:
        """The token ids up to where the answer begins. Raises `InvalidInput` if the chat format cannot write it."""
        return self.prompting.prompt_ids(asked.messages, asked.system, asked.tools)

    def generate(self, asked: Sequence[Asked], max_new_tokens: int | None = None) -> Iterator[str]:
        """The answers, in order. `max_new_tokens` None: as the run file has it."""
        return self.answers([self.prompt_ids(one) for one in asked], max_new_tokens)

    def answers(self, prompts: Sequence[Sequence[int]], max_new_tokens: int | None = None) -> Iterator[str]:
        """The answers to prompts that are token ids already, in order."""
        settings = self.settings
        if max_new_tokens is not None:
            settings = replace(settings, max_new_tokens=max_new_tokens)
        for ids in self.answer_ids(prompts, settings):
            yield self.text_of(ids)

    def answer_ids(self, prompts: Sequence[Sequence[int]], settings: Settings) -> Iterator[list[int]]:
        """The ids of the answers to prompts, in order, without the stop token."""
        from luthier.infer.batch import generate_answers

        return generate_answers(
            self.model,
            self.tokenizer,
            prompts,
            settings,
            self.stop_ids,
            self.batch_size,
            fast_path=self.fast_path,
        )

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of an answer, for `read`: with its special tokens if thoughts or calls cannot be told without."""
        skips = self.settings.skip_special_tokens and self._hidden is None
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=skips))

    def reference(self, ids: Sequence[int]) -> str:
        """The text of the answer of a row, up to where the model would stop."""
        return self.text_of(before_stop(ids, self.stop_ids))

    @cached_property
    def _hidden(self) -> re.Pattern[str] | None:
        """Matches special tokens, if some of them are tags of thoughts or calls and an answer is to have none."""
        if not self.settings.skip_special_tokens:
            return None
        return self.answer_format.hidden(special_texts(self.tokenizer), has_tools=True)

    def _shown(self, text: str) -> str:
        return text if self._hidden is None else self._hidden.sub("", text)

    def read(self, answer: str, prompt: Sequence[int], *, with_calls: bool) -> "Read":
        """An answer with thought, words and calls told apart. `prompt`: ids; its end may open a thought."""
        end_of_prompt = str(self.tokenizer.decode(list(prompt[-TAIL_TOKENS:])))
        tags = self.answer_format.thinking_tags
        reader = AnswerReader(tags, is_thinking=opens_thought(end_of_prompt, tags))
        parts = [*reader.push(answer), *reader.finish()]
        thought = "".join(part.text for part in parts if isinstance(part, Thought))
        words = "".join(part.text for part in parts if isinstance(part, Words))
        if not with_calls:
            return Read(self._shown(thought), self._shown(words))
        # Rows are token ids here and have no list of tools; the syntax shows what is a call.
        message = split_calls(words, 0, self.answer_format.call_syntax, "[]")
        return Read(self._shown(thought), self._shown(message.content), message.calls)
