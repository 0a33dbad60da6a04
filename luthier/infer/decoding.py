"""Settings for `generate()` of transformers, and token ids back to text."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from luthier.infer.types import Settings
from luthier.model.classes import is_routed

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for bytes that are not (yet) a whole character."""
MAX_BYTES = 4
"""Of a character in UTF-8."""
MAX_WAITING = 64
"""Tokens that wait for the rest of a character. So many are no character."""


def num_positions(model: "PreTrainedModel") -> int | None:
    """The maximum sequence length of the model, or None if its architecture has no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def end_ids(model: "PreTrainedModel") -> tuple[int, ...]:
    """The tokens that the model's generation_config.json names as ends of an answer."""
    ends = model.generation_config.eos_token_id
    return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)


def stop_strings(model: "PreTrainedModel") -> tuple[str, ...]:
    """The texts that the model's generation_config.json names as ends of an answer."""
    return stop_strings_of(model.generation_config)


def stop_strings_of(config: "GenerationConfig") -> tuple[str, ...]:
    own = config.stop_strings
    return () if not own else (own,) if isinstance(own, str) else tuple(own)


@contextmanager
def stop_strings_apart(model: "PreTrainedModel") -> Iterator[None]:
    """While open, the model names none: `generate` of transformers 5.24 takes them with its own loops only."""
    generation = model.generation_config
    own, generation.stop_strings = generation.stop_strings, None
    try:
        yield
    finally:
        generation.stop_strings = own


def generation_config(
    settings: Settings,
    *,
    model: "PreTrainedModel",
    num_prompt_tokens: int,
    num_new_tokens: int,
    stop_ids: Collection[int],
    pad_token_id: int,
    use_cache: bool = True,
) -> "GenerationConfig":
    """Settings as transformers takes them. The model's generation_config.json fills in what is left unset."""
    from transformers import GenerationConfig

    if settings.is_greedy:  # neutral values, so that the model's own are not filled in and warned about
        choice: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    else:
        choice = {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
        } | ({} if settings.min_p is None else {"min_p": settings.min_p})
    if settings.num_beams > 1:
        choice["length_penalty"] = settings.length_penalty
    # transformers takes one of two limits and warns if it finds both, one of them in the model's own file
    if model.generation_config.max_new_tokens is None:
        choice["max_length"] = num_prompt_tokens + num_new_tokens
    else:
        choice["max_new_tokens"] = num_new_tokens
    return GenerationConfig(
        num_beams=settings.num_beams,
        repetition_penalty=settings.repetition_penalty,
        eos_token_id=sorted(stop_ids),
        pad_token_id=pad_token_id,
        use_cache=use_cache and not is_routed(model.config),
        **choice,
    )


class TextStream:
    """Turns a stream of token ids into text. The pieces add up to the decoded whole.

    A token may be only part of a character, and a tokenizer may write a token differently at the start of a text
    (leading spaces of SentencePiece). So each step decodes a window that begins one output earlier and returns what is
    new in it. A window that ends in half a character waits.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip_special_tokens = tokenizer, skip_special_tokens
        self._ids: list[int] = []
        self._window_start, self._num_given = 0, 0
        self._skipped: dict[int, bool] = {}

    def push(self, token_id: int) -> str:
        """The text that this token completes; often empty."""
        if self._skip_special_tokens and self._is_skipped(token_id):
            return ""
        self._ids.append(token_id)
        fresh = self._fresh()
        if fresh and not fresh.endswith(UNFINISHED):
            return self._give(len(self._ids), fresh)
        if len(self._ids) - self._num_given >= MAX_WAITING:
            return self._give_broken(fresh)
        return ""

    def finish(self) -> str:
        """The rest of the text; half a character is dropped."""
        return self._fresh().rstrip(UNFINISHED)

    def _give(self, num_ids: int, text: str) -> str:
        self._window_start, self._num_given = self._num_given, num_ids
        return text

    def _give_broken(self, fresh: str) -> str:
        """The text of bytes that are no characters, but for the last ones: a character may begin there.

        Without this a window of broken bytes would grow, and so would the time for each of them.
        """
        for num_rest in range(MAX_BYTES, 2 * MAX_BYTES):
            at = len(self._ids) - num_rest
            given = self._decode(self._ids[self._window_start : self._num_given])
            text = self._decode(self._ids[self._window_start : at])[len(given) :]
            if text and text + self._decode(self._ids[at:]) == fresh:  # the cut is not inside a character
                return self._give(at, text)
        return ""

    def _is_skipped(self, token_id: int) -> bool:
        """Whether it is a special token, which has no text. An answer may repeat one without end (`ignore_eos`)."""
        if token_id not in self._skipped:
            shown = self._tokenizer.decode([token_id], skip_special_tokens=False)
            self._skipped[token_id] = bool(shown) and not self._decode([token_id])
        return self._skipped[token_id]

    def _fresh(self) -> str:
        given = self._decode(self._ids[self._window_start : self._num_given])
        return self._decode(self._ids[self._window_start :])[len(given) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(
            ids, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return str(text)  # `decode` is annotated more loosely, but one list of ids gives one text
