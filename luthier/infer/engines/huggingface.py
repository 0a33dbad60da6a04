"""Models of transformers in this process. One thread owns the model; its answers share a batch."""

import os
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from luthier.core.errors import InvalidInput
from luthier.infer.engines import Delivery, Engine, Ticket
from luthier.infer.types import Answer, Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from luthier.config.runs import InferRun
    from luthier.infer.row import Row
    from luthier.model.files.sources import ModelSource

MAX_CONCURRENT = 8
"""How many answers share a batch, unless the environment variable of this name says otherwise."""
_MOST_CONCURRENT = 4096


class HuggingFaceModel:
    """A loaded model with its tokenizer. An answer ends at the first token in `stop_ids`."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        stop_ids: Collection[int],
        *,
        use_kv_cache: bool = True,
        max_rows: int = MAX_CONCURRENT,
    ) -> None:
        from luthier.infer.answering import AnswerThread

        self.model, self.tokenizer, self.stop_ids = model, tokenizer, frozenset(stop_ids)
        self._thread = AnswerThread(
            model,
            tokenizer,
            self.stop_ids,
            max_rows=max_rows,
            use_cache=use_kv_cache,
            free_bytes=lambda: free_bytes(model),
        )

    @property
    def num_running(self) -> int:
        return self._thread.num_running

    @property
    def num_waiting(self) -> int:
        return self._thread.num_waiting

    def submit(
        self, prompt_ids: Sequence[int], settings: Settings, deliver: "Callable[[Delivery], None] | None" = None
    ) -> Ticket:
        from luthier.infer.alone import check_beams
        from luthier.infer.answering import QueuedTicket

        check_beams(settings)
        ticket = QueuedTicket()
        row = self._row(prompt_ids, settings, deliver or ticket.deliver)
        ticket.belongs_to(row)
        self._thread.submit(row)
        return ticket

    def stream(self, prompt_ids: Sequence[int], settings: Settings) -> Generator[str, None, Answer]:
        ticket = self.submit(prompt_ids, settings)
        try:
            for piece in ticket.pieces():
                if piece.text:
                    yield piece.text
        finally:
            ticket.cancel()
        return ticket.answer

    def generate(self, prompt_ids: Sequence[int], settings: Settings) -> Answer:
        pieces = self.stream(prompt_ids, settings)
        while True:
            try:
                next(pieces)
            except StopIteration as done:
                return done.value

    def close(self) -> None:
        self._thread.close()

    def _row(self, prompt_ids: Sequence[int], settings: Settings, deliver: "Callable[[Delivery], None]") -> "Row":
        from luthier.infer.decoding import num_positions
        from luthier.infer.row import Row

        limit = num_positions(self.model)
        num_new_tokens = settings.num_new_tokens(len(prompt_ids), limit)
        scores_only = settings.prompt_logprobs and (limit is None or len(prompt_ids) <= limit)
        if num_new_tokens <= 0 and not scores_only:
            reason = (
                f"the model takes {limit}; start a new conversation"
                if limit is not None and len(prompt_ids) >= limit
                else f"max_length is {settings.max_length}; raise it or set max_new_tokens"
            )
            raise InvalidInput(f"no room for an answer: the prompt has {len(prompt_ids)} tokens and {reason}")
        return Row(
            prompt_ids,
            settings,
            num_new_tokens=num_new_tokens,
            stop_ids=self.stop_ids,
            tokenizer=self.tokenizer,
            deliver=deliver,
        )


def free_bytes(model: "PreTrainedModel") -> int | None:
    """The memory that is free on the device of the model; None if it is unknown."""
    import torch

    from luthier.core.machine import available_memory_bytes

    return torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else available_memory_bytes()


def max_concurrent(environ: Mapping[str, str]) -> int:
    """The value of MAX_CONCURRENT. Raises `InvalidInput` unless it is a whole number above 0."""
    text = environ.get("MAX_CONCURRENT", "").strip() or str(MAX_CONCURRENT)
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= _MOST_CONCURRENT:
        raise InvalidInput(f"MAX_CONCURRENT: {text!r}: should be a whole number from 1 to {_MOST_CONCURRENT}")
    return int(text)


def open_model(run: "InferRun", source: "ModelSource", tokenizer: Any, stop_ids: Collection[int]) -> HuggingFaceModel:
    """Load the model of a run. End tokens in its generation_config.json are added to `stop_ids`."""
    from luthier.infer.decoding import end_ids
    from luthier.model.backends import load_for_inference
    from luthier.model.embeddings import add_missing_rows

    model = load_for_inference(run, source=source)
    add_missing_rows(model, tokenizer, source)
    all_ends = {*stop_ids, *end_ids(model)}
    return HuggingFaceModel(
        model, tokenizer, all_ends, use_kv_cache=run.model.use_kv_cache, max_rows=max_concurrent(os.environ)
    )


ENGINE = Engine(name="huggingface", open=open_model)
