"""Models of transformers in this process. One thread owns the model; its answers share a batch."""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from luthier.core.threads import in_own_thread
from luthier.infer.concurrency import MAX_CONCURRENT, max_concurrent
from luthier.infer.engines import Delivery, Engine, Ticket
from luthier.infer.tickets import QueuedTicket, Streaming
from luthier.infer.types import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from luthier.config.runs import InferRun
    from luthier.data.pixels import Pixels
    from luthier.model.files.sources import ModelSource


class HuggingFaceModel(Streaming):
    """A loaded model with its tokenizer. An answer ends at the first token in `stop_ids`."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        stop_ids: Collection[int],
        *,
        use_kv_cache: bool = True,
        max_rows: int = MAX_CONCURRENT,
        fast_path: bool = True,
        stops: Collection[str] = (),
    ) -> None:
        """`stops`: stop strings of every answer."""
        from luthier.infer.answering import AnswerThread

        self.model, self.tokenizer, self.stop_ids = model, tokenizer, frozenset(stop_ids)
        self.stops = tuple(stops)
        self.pixels: Pixels | None = None
        """Makes what the model takes of images; None if it does not see, or is not asked to."""
        self._thread = AnswerThread(
            model,
            tokenizer,
            self.stop_ids,
            max_rows=max_rows,
            use_cache=use_kv_cache,
            free_bytes=lambda: free_bytes(model),
            fast_path=fast_path,
        )

    @property
    def num_positions(self) -> int | None:
        from luthier.infer.decoding import num_positions

        return num_positions(self.model)

    @property
    def fault(self) -> str | None:
        """A failed device. Any other error ends the answers it concerns, and later ones are answered as before."""
        return None if self._thread.failure is None else str(self._thread.failure)

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
        from luthier.infer.row import new_row
        from luthier.infer.seen import SeenPrompt

        check_beams(settings)
        ticket = QueuedTicket()
        row = new_row(
            prompt_ids,
            replace(settings, stop=(*settings.stop, *self.stops)),
            num_positions=self.num_positions,
            stop_ids=self.stop_ids,
            tokenizer=self.tokenizer,
            deliver=deliver or ticket.deliver,
        )
        if isinstance(prompt_ids, SeenPrompt):
            assert self.pixels is not None, "prompts with images are written for models that see"
            row.seen = partial(prompt_ids.inputs, self.pixels)
        ticket.belongs_to(row)
        self._thread.submit(row)
        return ticket

    def close(self) -> None:
        self._thread.close()


def free_bytes(model: "PreTrainedModel") -> int | None:
    """The memory that is free on the device of the model, or kept by PyTorch for reuse; None if it is unknown."""
    import torch

    from luthier.core.machine import available_memory_bytes

    if model.device.type != "cuda":
        return available_memory_bytes()
    kept = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return torch.cuda.mem_get_info(model.device)[0] + kept


def open_model(run: "InferRun", source: "ModelSource", tokenizer: Any, stop_ids: Collection[int]) -> HuggingFaceModel:
    """Load the model of a run. End tokens in its generation_config.json are added to `stop_ids`, and its stop
    strings end an answer as well."""
    return in_own_thread(partial(_opened, run, source, tokenizer, stop_ids))


def _opened(run: "InferRun", source: "ModelSource", tokenizer: Any, stop_ids: Collection[int]) -> HuggingFaceModel:
    from luthier.infer.decoding import end_ids, stop_strings
    from luthier.model.backends import load_for_inference
    from luthier.model.embeddings import add_missing_rows

    model = load_for_inference(run, source=source)
    add_missing_rows(model, tokenizer, source)
    all_ends, stops = {*stop_ids, *end_ids(model)}, stop_strings(model)
    model.generation_config.stop_strings = None  # see `stop_strings_apart`
    return HuggingFaceModel(
        model,
        tokenizer,
        all_ends,
        use_kv_cache=run.model.use_kv_cache,
        max_rows=max_concurrent(os.environ),
        fast_path=run.model.fast_path,
        stops=stops,
    )


ENGINE = Engine(name="huggingface", open=open_model)
