"""The answers of one request, as they arrive from the thread of the model."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.core.errors import DeviceFailed, InvalidInput, LuthierError
from luthier.core.log import warn
from luthier.infer.engines import Delivery
from luthier.infer.types import Answer, GrammarFault, Piece, Settings, UnsupportedSetting
from luthier.serve.errors import ApiError, engine_ended, failed, too_long
from luthier.serve.metrics import Metrics

if TYPE_CHECKING:
    from luthier.infer.engines import Ticket
    from luthier.serve.admission import Admission
    from luthier.serve.model import ChatModel


@dataclass(frozen=True, slots=True)
class Job:
    prompt_ids: Sequence[int]
    settings: Settings
    param: str
    """The field of the request that the prompt comes from."""
    grammar_param: str | None = None
    """The field that the grammar of the settings comes from."""


class Answers:
    """Start, iterate, close. Iterating yields (number of the job, piece or answer) in the order of arrival, until all
    have ended; it raises `ApiError` for a job that fails.
    """

    def __init__(self, model: "ChatModel", admission: "Admission", metrics: Metrics, jobs: Sequence[Job]) -> None:
        self._model, self._admission, self._metrics, self._jobs = model, admission, metrics, jobs
        self._arrived: asyncio.Queue[tuple[int, Delivery]] = asyncio.Queue()
        self._tickets: dict[int, Ticket] = {}
        """Of the jobs that have not ended."""
        self.ended: dict[int, Answer] = {}
        """The answers that are whole."""
        self._started = 0.0
        self._begun: set[int] = set()

    def start(self) -> None:
        """Ask the model. Raises `ApiError` for a prompt that is too long and for a full queue."""
        limit = self._model.num_positions
        for job in self._jobs:
            # A prompt that fills the context can still be scored.
            if limit is not None and len(job.prompt_ids) + (not job.settings.prompt_logprobs) > limit:
                raise too_long(len(job.prompt_ids), limit, job.param)
        self._admission.enter(len(self._jobs))
        self._started = time.perf_counter()
        with ExitStack() as stack:
            stack.callback(self._give_up)
            for number, job in enumerate(self._jobs):
                self._submit(number, job)
            stack.pop_all()
        self._metrics.prompt_tokens += sum(len(job.prompt_ids) for job in self._jobs)

    def _give_up(self) -> None:
        """A job could not be started, whatever the reason: none of them takes a place."""
        self._admission.leave(len(self._jobs) - len(self._tickets))
        self.close()

    def close(self) -> None:
        """End what has not ended."""
        for ticket in self._tickets.values():
            ticket.cancel()
        self._metrics.canceled += len(self._tickets)
        self._admission.leave(len(self._tickets))
        self._tickets.clear()

    def abort(self, error: ApiError) -> None:
        """Whoever iterates gets this error, unless everything has ended."""
        if self._tickets:
            self._arrived.put_nowait((next(iter(self._tickets)), error))

    def cancel(self, number: int) -> None:
        """End one job; nothing more arrives for it."""
        if number in self._tickets:
            self._tickets.pop(number).cancel()
            self._admission.leave()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece | Answer]]:
        while self._tickets:
            number, item = await self._arrived.get()
            if number not in self._tickets:  # canceled
                continue
            if isinstance(item, Exception):
                self._ended(number)
                raise _as_api_error(item, self._jobs[number])
            if number not in self._begun:
                self._begun.add(number)
                self._metrics.first_token_seconds.observe(time.perf_counter() - self._started)
            if isinstance(item, Answer):
                self.ended[number] = item
                self._ended(number)
                self._metrics.generated_tokens += item.num_new_tokens
            yield number, item

    def _ended(self, number: int) -> None:
        del self._tickets[number]
        self._admission.leave()

    def _submit(self, number: int, job: Job) -> None:
        loop = asyncio.get_running_loop()

        def deliver(item: Delivery) -> None:
            """Called in the thread of the model."""
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._arrived.put_nowait, (number, item))

        try:
            self._tickets[number] = self._model.engine.submit(job.prompt_ids, job.settings, deliver)
        except InvalidInput as fault:
            raise _as_api_error(fault, job) from fault


def _as_api_error(fault: Exception, job: Job) -> ApiError:
    if isinstance(fault, ApiError):
        return fault
    if isinstance(fault, UnsupportedSetting):
        return ApiError(str(fault), param=fault.name)
    if isinstance(fault, GrammarFault):
        return ApiError(str(fault), param=job.grammar_param)
    if isinstance(fault, InvalidInput):
        return ApiError(str(fault), param=job.param, code=_code_of(fault))
    if isinstance(fault, DeviceFailed):
        return engine_ended(str(fault))
    if isinstance(fault, LuthierError):
        return ApiError(str(fault), status=500, type="server_error")
    warn(f"an answer failed: {type(fault).__name__}: {fault}")
    return failed()


def _code_of(fault: InvalidInput) -> str | None:
    return "context_length_exceeded" if str(fault).startswith("no room for an answer") else None
