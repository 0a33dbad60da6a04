"""The thread that owns a model and answers rows in a batch."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from threading import Lock
from typing import TYPE_CHECKING

from luthier.core.errors import DeviceFailed
from luthier.core.files import size
from luthier.core.log import info
from luthier.infer.alone import answer_alone
from luthier.infer.batching import RowBatch, can_batch, num_read_together
from luthier.infer.grammar import Grammars
from luthier.infer.products import Products
from luthier.infer.row import ROW_FAULTS, Row
from luthier.model.failed_device import require_working_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARE_FOR_CACHE = 0.8
"""Of the memory that is free once the model is loaded; the rest is for what is computed."""


class AnswerThread:
    """Answers rows in the order in which they come, up to `max_rows` of them together.

    The thread works while there is a row and ends with the last one, so a program that is done need not end it.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        stop_ids: frozenset[int],
        *,
        max_rows: int,
        use_cache: bool = True,
        free_bytes: Callable[[], int | None] = lambda: None,
        fast_path: bool = True,
    ) -> None:
        """`free_bytes`: the memory that is free, asked for now and when the first prompt has been read; None if it is
        unknown. `fast_path`: answers take faster ways to the same numbers, up to rounding."""
        self.model, self.tokenizer, self.max_rows, self.use_cache = model, tokenizer, max_rows, use_cache
        self._grammars = Grammars(tokenizer, stop_ids)
        self._products = Products(model, free_bytes()) if fast_path else None
        if self._products is not None:
            self._products.prepare()
        shares = use_cache and can_batch(model)
        self._batch = RowBatch(model, tokenizer, stop_ids, self._grammars, fast_path=fast_path) if shares else None
        self.failure: DeviceFailed | None = None
        """Why nothing can be answered any more."""
        self._waiting: deque[Row] = deque()
        self._newcomers: list[Row] = []
        """The rows that began last."""
        self._is_working = False
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._free_bytes = free_bytes
        self._max_tokens: int | None = None
        self._has_asked_memory = self._has_told = self._has_told_room = False
        self._bytes_per_token = 0.0

    @property
    def num_running(self) -> int:
        return len(self._batch.rows) if self._batch is not None else int(self._is_working)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, row: Row) -> None:
        with self._lock:
            if self.failure is None:
                self._waiting.append(row)
                if self._is_working:
                    return
                self._is_working = True
        if self.failure is not None:
            row.fail(self.failure)
            return
        self._pool.submit(self._work).add_done_callback(self._stopped)

    def close(self) -> None:
        """Cancel every row and wait for the thread."""
        with self._lock:
            rows = [*self._waiting, *(self._batch.rows if self._batch is not None else ())]
        for row in rows:
            row.is_canceled = True
        self._pool.shutdown()

    def _work(self) -> None:
        self._tell_once()
        with self._products.in_use() if self._products is not None else nullcontext():
            while self._has_work():
                self._newcomers = newcomers = self._next()
                if newcomers and self._goes_alone(newcomers[0]):
                    self._answer_alone(newcomers[0])
                else:
                    self._answer_together(newcomers)

    def _answer_together(self, newcomers: list[Row]) -> None:
        """One more token for every row, these included."""
        assert self._batch is not None
        try:
            self._batch.add(newcomers)
            self._note_memory()
            self._batch.step()
        except ROW_FAULTS as fault:  # of the model, such as memory that is refused: it concerns all rows
            require_working_device(fault)
            for row in self._batch.clear():
                row.fail(fault)

    def _has_work(self) -> bool:
        """Whether there is a row; if there is none, the thread ends."""
        with self._lock:
            self._is_working = bool(self._waiting or (self._batch is not None and self._batch.rows))
            return self._is_working

    def _next(self) -> list[Row]:
        """The next rows that may begin now, whose prompts are read together. Canceled ones are dropped."""
        with self._lock:
            self._waiting = deque(row for row in self._waiting if not row.is_canceled)
            fitting: list[Row] = []
            for row in self._waiting:
                if not self._fits(row, fitting):
                    break
                fitting.append(row)
            count = num_read_together(fitting) if fitting else 0
            return [self._waiting.popleft() for _ in range(count)]

    def _goes_alone(self, row: Row) -> bool:
        return self._batch is None or row.settings.num_beams > 1 or row.seen is not None

    def _fits(self, row: Row, before: list[Row]) -> bool:
        """Whether a row may begin beside those that run and those `before` it: is there a place, and memory?"""
        running = [*(self._batch.rows if self._batch is not None else ()), *before]
        if not running:
            return True
        self._tell_room()
        if self._goes_alone(row) or self._goes_alone(running[-1]) or len(running) >= self.max_rows:
            return False
        longest = max(len(one.prompt_ids) + one.num_new_tokens for one in (row, *running))
        return self._max_tokens is None or longest * (len(running) + 1) <= self._max_tokens

    def _answer_alone(self, row: Row) -> None:
        try:
            answer_alone(self.model, self.tokenizer, self._grammars, row, use_cache=self.use_cache)
        except ROW_FAULTS as fault:
            require_working_device(fault)
            row.fail(fault)

    def _note_memory(self) -> None:
        """Once the size of a token is known, work out how many fit."""
        assert self._batch is not None
        per_token = self._batch.bytes_per_token
        if self._has_asked_memory or not per_token:
            return
        self._has_asked_memory, free = True, self._free_bytes()
        if free is None:
            return
        self._max_tokens, self._bytes_per_token = max(int(free * SHARE_FOR_CACHE) // per_token, 1), per_token

    def _tell_room(self) -> None:
        """Said when a second answer asks for a place: a conversation in a terminal would show it amid its first one."""
        if self._max_tokens is None or self._has_told_room:
            return
        self._has_told_room = True
        info(
            f"batch: up to {self.max_rows} answers at once, with {self._max_tokens:,} tokens together"
            f" ({size(self._bytes_per_token)} each)"
        )

    def _tell_once(self) -> None:
        if self._batch is None and not self._has_told:
            info("batch: this model answers one prompt at a time")
        self._has_told = True

    def _stopped(self, work: "Future[None]") -> None:
        """Deliver what ended the thread, if it was not the end of the work."""
        fault = work.exception()
        if fault is None:
            return
        with self._lock:
            self.failure = fault if isinstance(fault, DeviceFailed) else None
            rows = [*self._newcomers, *self._waiting, *(self._batch.clear() if self._batch is not None else ())]
            self._waiting.clear()
            self._is_working = False
        for row in rows:
            row.fail(fault if isinstance(fault, Exception) else RuntimeError(str(fault)))
