"""Answers of a model that a child process serves. Token ids go there and back; texts and stops are made here."""

import http.client
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, Protocol

from luthier.core.errors import InvalidInput, RunFailed
from luthier.core.ports import HOST
from luthier.infer.servers.calls import Call, Refused
from luthier.infer.servers.child import ChildServer
from luthier.infer.tickets import QueuedTicket, Streaming
from luthier.infer.types import FinishReason, Settings, Token, UnsupportedSetting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luthier.infer.engines import Delivery, Ticket
    from luthier.infer.row import Row

FORM_FAULTS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What reading an event in another form, or tokens that are none, may raise."""
_DEATH_SECONDS = 3.0
"""Between a connection that breaks and the end of the process that broke it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What an event of a stream says."""

    tokens: tuple[Token, ...] = ()
    """New ones of the answer, the one that ends it included."""
    prompt_tokens: tuple[Token, ...] = ()
    finish_reason: FinishReason | None = None
    """In the last event."""
    fault: str = ""
    """Why the server gave the answer up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What is asked of a server. Settings that a server spells alike are read from `settings`."""

    prompt_ids: Sequence[int]
    settings: Settings
    num_new_tokens: int
    stop_ids: Collection[int]

    @property
    def choice(self) -> dict[str, Any]:
        """How tokens are chosen, under the names of vLLM and SGLang."""
        settings = self.settings
        is_greedy = settings.is_greedy or settings.top_p == 0 or settings.top_k == 1
        chosen: dict[str, Any] = {
            "temperature": 0.0 if is_greedy else settings.temperature,
            "top_p": 1.0 if is_greedy else settings.top_p,
            "repetition_penalty": settings.repetition_penalty,
            "presence_penalty": settings.presence_penalty,
            "frequency_penalty": settings.frequency_penalty,
            "min_p": 0.0 if is_greedy else settings.min_p or 0.0,
        }
        if settings.logit_bias:
            chosen["logit_bias"] = {str(token_id): bias for token_id, bias in settings.logit_bias.items()}
        return chosen


class Dialect(Protocol):
    """How a server is spoken to."""

    name: str
    path: str
    install_hint: str

    def check(self, settings: Settings) -> None:
        """Raises `UnsupportedSetting`."""

    def body(self, ask: Ask) -> dict[str, Any]:
        """The request, as JSON, for a stream of events."""

    def read(self, event: Mapping[str, Any], ask: Ask) -> Event:
        """Raises one of `FORM_FAULTS` for an event in another form."""


class ServedModel(Streaming):
    """A model that `server` answers for."""

    def __init__(
        self,
        server: ChildServer,
        key: str,
        dialect: Dialect,
        tokenizer: "PreTrainedTokenizerBase",
        stop_ids: Collection[int],
        *,
        num_positions: int,
        max_rows: int,
        min_p: float | None = None,
        stops: Collection[str] = (),
    ) -> None:
        """`key`: of the server's API. `min_p` and `stops`, stop strings of every answer: of the model's
        generation_config.json."""
        self.server, self.tokenizer, self.stop_ids = server, tokenizer, frozenset(stop_ids)
        self.num_positions = num_positions
        self._key, self._dialect, self._min_p = key, dialect, min_p
        self._max_rows, self._stops = max_rows, tuple(stops)
        self._waiting: deque[_Job] = deque()
        self._running: set[_Job] = set()
        self._num_threads = 0
        self._lock, self._decoding = Lock(), Lock()

    @property
    def fault(self) -> str | None:
        return None if self.server.is_alive else str(self.server.failure())

    def submit(
        self, prompt_ids: Sequence[int], settings: Settings, deliver: "Callable[[Delivery], None] | None" = None
    ) -> "Ticket":
        from luthier.infer.row import new_row
        from luthier.infer.seen import SeenPrompt

        if settings.num_beams > 1:
            raise UnsupportedSetting("num_beams", f"{self._dialect.name} has no beam search that streams")
        if isinstance(prompt_ids, SeenPrompt):
            raise UnsupportedSetting(
                "media", f"{self._dialect.name} gets token ids alone -> infer_backend: huggingface"
            )
        self._dialect.check(settings)
        if settings.min_p is None:
            settings = replace(settings, min_p=self._min_p)
        settings = replace(settings, stop=(*settings.stop, *self._stops))
        ticket = _Ticket()
        row = new_row(
            prompt_ids,
            settings,
            num_positions=self.num_positions,
            stop_ids=self.stop_ids,
            tokenizer=self.tokenizer,
            deliver=deliver or ticket.deliver,
        )
        ask = Ask(
            prompt_ids=row.prompt_ids, settings=settings, num_new_tokens=row.num_new_tokens, stop_ids=row.stop_ids
        )
        call = Call(HOST, self.server.port, self._dialect.path, self._dialect.body(ask), self._key)
        ticket.belongs_to_call(row, call)
        self._begin(_Job(row, ask, call))
        return ticket

    def close(self) -> None:
        with self._lock:
            jobs = [*self._waiting, *self._running]
            self._waiting.clear()
        for job in jobs:
            job.row.is_canceled = True
            job.call.hang_up()
        self.server.close()

    def _begin(self, job: "_Job") -> None:
        with self._lock:
            self._waiting.append(job)
            if self._num_threads >= self._max_rows:
                return
            self._num_threads += 1
        # A daemon, since Python waits for other threads before it ends the server that they wait for.
        Thread(target=self._work, daemon=True, name="answers").start()

    def _work(self) -> None:
        """Answer what waits, one after the other, and end when nothing does."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._num_threads -= 1
                    return
                job = self._waiting.popleft()
                self._running.add(job)
            try:
                if not job.row.is_canceled:
                    self._answer(job)
            finally:
                with self._lock:
                    self._running.discard(job)

    def _answer(self, job: "_Job") -> None:
        name = self._dialect.name
        fault: Exception
        try:
            if self._follow(job):
                return
            fault = RunFailed(f"{name} broke off an answer")
        except Refused as refusal:
            fault = (InvalidInput if refusal.is_input else RunFailed)(f"{name} refuses this: {refusal}")
        except FORM_FAULTS as error:
            fault = RunFailed(
                f"{name} answers in a form that luthier does not know ({type(error).__name__}: {error})"
                f" -> {self._dialect.install_hint}"
            )
        except (OSError, http.client.HTTPException) as error:
            fault = RunFailed(f"the connection to {name} broke ({error or type(error).__name__})")
        if job.row.is_canceled:
            return
        if isinstance(fault, RunFailed) and self.server.ends_within(_DEATH_SECONDS):
            fault = self.server.failure()
        job.row.fail(fault)

    def _follow(self, job: "_Job") -> bool:
        """Read the events of an answer. Returns whether it has ended."""
        row = job.row
        for content in job.call.events():
            event = self._dialect.read(content, job.ask)
            if event.fault:
                raise Refused(event.fault, is_input=False)
            with self._decoding:
                if event.prompt_tokens:
                    row.prompt_tokens = event.prompt_tokens
                if row.num_new_tokens <= 0:  # the prompt is scored and nothing else
                    row.end()
                    return True
                if any(row.push(token) for token in event.tokens) or row.is_canceled:
                    return True
                if event.finish_reason is not None:
                    row.end(stopped=event.finish_reason == "stop")
                    return True
        return False


@dataclass(frozen=True, eq=False)
class _Job:
    row: "Row"
    ask: Ask
    call: Call


class _Ticket(QueuedTicket):
    def belongs_to_call(self, row: "Row", call: Call) -> None:
        self.belongs_to(row)
        self._call = call

    def cancel(self) -> None:
        super().cancel()
        self._call.hang_up()
