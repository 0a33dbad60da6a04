"""Everything that turns an example into token ids: tokenizer, chat format, length limit, thinking."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from luthier.data.chat.completeness import require_complete
from luthier.data.chat.encoder import Encoder, TurnIds
from luthier.data.chat.model_template import ModelChatTemplate
from luthier.data.chat.render import Turn, render
from luthier.data.media.expand import MediaSide
from luthier.data.rows.closing_marks import closing_marks, num_closing_marks
from luthier.data.rows.labels import IGNORE_INDEX, Encoded, cut_turn, with_blocks_apart
from luthier.data.rows.tokenize import Written, turn_ids
from luthier.data.templates import Template
from luthier.data.types import Dialogue


@dataclass(frozen=True, slots=True)
class Encoding:
    encoder: Encoder
    template: Template
    cutoff_len: int | None
    """Maximum tokens of a row; None for no limit."""
    enable_thinking: bool | None = True
    preserve_thinking: bool = False
    model_template: ModelChatTemplate | None = None
    """The model's own chat template, if it renders the conversations instead of `template`."""
    media: MediaSide | None = None
    """How media are written, if a dataset of the run declares some and the model takes them."""

    def unlimited(self) -> "Encoding":
        return replace(self, cutoff_len=None)

    def with_thinking(self, enable_thinking: bool | None) -> "Encoding":
        model_template = (
            None if self.model_template is None else replace(self.model_template, enable_thinking=enable_thinking)
        )
        return replace(self, enable_thinking=enable_thinking, model_template=model_template)

    def rows(self, dialogue: Dialogue, *, keep_past_thinking: bool) -> list[list[TurnIds]]:
        """The turns of a conversation for training: (prompt ids, answer ids) for each answer."""
        written = self.written(dialogue, keep_past_thinking=keep_past_thinking)
        if self.media is None or not dialogue.media.items:
            return turn_ids(self.encoder, written)
        seen = self.media.seen(dialogue.media.items)
        turns = turn_ids(self.encoder, list(map(seen.expanded, written)))
        return [seen.marked(found, row, self.encoder) for found, row in zip(turns, written, strict=True)]

    def written(self, dialogue: Dialogue, *, keep_past_thinking: bool) -> Sequence[Written]:
        """The same before it is tokenized.

        It is one row, unless the model's own chat template rewrites history. Such a template also decides which past
        thoughts are kept.
        """
        if self.model_template is not None:
            says_itself = any(message.loss for message in dialogue.messages[:-1])
            return self.model_template.rows(dialogue, only_last=not keep_past_thinking and not says_itself)
        turns = render(
            self.template,
            dialogue.messages,
            system=dialogue.system,
            tools=dialogue.tools,
            enable_thinking=self.enable_thinking,
            preserve_thinking=self.preserve_thinking,
            purpose="train",
            keep_past_thinking=keep_past_thinking,
        )
        self._require_complete(dialogue, turns, only_last=not keep_past_thinking)
        return [turns]

    def written_last(self, dialogue: Dialogue) -> Written:
        """The last answer alone, before it is tokenized. Its prompt holds the history as a server sends it."""
        if self.model_template is not None:
            return self.model_template.last_row(dialogue)
        return self._last(dialogue)

    def written_apart(self, dialogue: Dialogue) -> Written:
        """The last answer, to be tokenized separately from its prompt, since a server has only the prompt."""
        return self._last(dialogue) if self.model_template is None else (self.model_template.last_turn(dialogue),)

    def _last(self, dialogue: Dialogue) -> tuple[Turn, ...]:
        turns = render(
            self.template,
            dialogue.messages,
            system=dialogue.system,
            tools=dialogue.tools,
            enable_thinking=self.enable_thinking,
            preserve_thinking=self.preserve_thinking,
            purpose="infer",
        )
        self._require_complete(dialogue, turns)
        return turns

    def _require_complete(self, dialogue: Dialogue, turns: Sequence[Turn], only_last: bool = False) -> None:
        """Raises `RowError` if an answer is not written in full. The turns are all, or the last one.

        `only_last`: earlier answers are learned, and must be written in full, only if they say so themselves.
        """
        answers = dialogue.messages[1::2]
        answers = answers[len(answers) - len(turns) :]
        for number, (message, turn) in enumerate(zip(answers, turns, strict=True), start=1):
            if only_last and number < len(turns) and not message.loss:
                continue
            require_complete(
                message,
                "".join(piece for piece in turn.answer if isinstance(piece, str)),
                thoughts_dropped=self.enable_thinking is False,
                thinking_tags=self.template.thinking_tags,
                tool_call_words=self.template.tool_call_words,
            )

    @property
    def closing_eos(self) -> int | None:
        """The end-of-text id, for formats that end the conversation with it instead of every answer."""
        return self.encoder.tokenizer.eos_token_id if self.template.efficient_eos else None

    def num_marks(self, prompt: Sequence[int]) -> int:
        """The number of tokens at the end of a prompt that are its closing marks."""
        return num_closing_marks(prompt, closing_marks(self.encoder, self.template, self.model_template))

    @property
    def leading_bos(self) -> int | None:
        """The begin-of-text id, for tokenizers that add one."""
        tokenizer = self.encoder.tokenizer
        return tokenizer.bos_token_id if getattr(tokenizer, "add_bos_token", False) else None

    @property
    def end_of_text(self) -> str:
        """The text that ends a plain text. Chats of Llama 3 end in <|eot_id|>, but plain texts do not."""
        return "<|end_of_text|>" if self.template.name == "llama3" else self.encoder.tokenizer.eos_token


def encode_last_turns(dialogues: Sequence[Dialogue], encoding: Encoding) -> list[Encoded]:
    """For generation: `input_ids` is the prompt of the last answer, `labels` is that answer. They share one budget."""
    written = [encoding.written_apart(dialogue) for dialogue in dialogues]
    seen = [encoding.media.seen(d.media.items) if encoding.media and d.media.items else None for d in dialogues]
    whole = [row if images is None else images.expanded(row) for row, images in zip(written, seen, strict=True)]
    turns = turn_ids(encoding.encoder, whole)
    rows = []
    for row, images, found in zip(written, seen, turns, strict=True):
        ((prompt, answer),) = found if images is None else images.marked(found, row, encoding.encoder)
        made = _prompt_and_answer(prompt, answer, encoding)
        rows.append(made if images is None else _apart(made))
    return rows


def _apart(row: Encoded) -> Encoded:
    """A row for generation with the places of its blocks. Its labels are no part of its ids."""
    blocks = with_blocks_apart(replace(row, labels=[IGNORE_INDEX] * len(row.input_ids)))
    return replace(blocks, labels=list(map(int, row.labels)))


def _prompt_and_answer(prompt: list[int], answer: list[int], encoding: Encoding) -> Encoded:
    if encoding.cutoff_len is None:
        return Encoded(prompt, answer)
    kept_prompt, kept_answer = cut_turn(prompt, answer, encoding.cutoff_len, encoding.num_marks)
    lost_labels = len(answer) - len(kept_answer)
    lost_tokens = len(prompt) - len(kept_prompt) + lost_labels
    return Encoded(kept_prompt, kept_answer, lost_tokens, lost_labels, lost_terminator=lost_labels > 0)
