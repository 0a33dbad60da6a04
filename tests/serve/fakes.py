"""A server in this process whose model says what the test wants, and clients for it."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import uvicorn

from luthier.data.chat.encoder import Encoder
from luthier.data.templates import get_template
from luthier.infer.prompting import TemplatePrompting
from luthier.infer.types import Answer, Piece, Settings, Token
from luthier.serve.app import build
from luthier.serve.model import ChatModel
from luthier.serve.options import ServerOptions
from luthier.serve.token_texts import TokenTexts
from tests.tiny import byte_tokenizer
from tests.waiting import until

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Łódź"}}\n</tool_call>'
Script = Sequence[str | float | Exception | threading.Event]
"""What an answer consists of: texts, seconds to wait, events to wait for, an error. A last word `...` cuts it off."""


class ScriptedTicket:
    def __init__(self) -> None:
        self.canceled = threading.Event()

    def cancel(self) -> None:
        self.canceled.set()


class ScriptedEngine:
    """Each answer comes from a thread of its own. The script depends on the text of the prompt."""

    def __init__(self, script: Callable[[str], Script]) -> None:
        self.script, self.tokenizer = script, byte_tokenizer()
        self.prompts: list[str] = []
        self.settings: list[Settings] = []
        self.tickets: list[ScriptedTicket] = []
        self.fault: str | None = None

    def submit(self, prompt_ids, settings, deliver):
        prompt, ticket = self.tokenizer.decode(list(prompt_ids)), ScriptedTicket()
        self.prompts.append(prompt)
        self.settings.append(settings)
        self.tickets.append(ticket)
        work = (self.script(prompt), list(prompt_ids), settings, deliver, ticket)
        threading.Thread(target=self._say, args=work, daemon=True).start()
        return ticket

    def _say(self, script, prompt_ids, settings, deliver, ticket) -> None:
        said: list[Token] = []
        reason = "stop"
        for step in script:
            if isinstance(step, threading.Event):
                while not step.wait(0.01) and not ticket.canceled.is_set():
                    pass
            elif isinstance(step, float):
                ticket.canceled.wait(step)
            if ticket.canceled.is_set():
                return
            if isinstance(step, Exception):
                deliver(step)
                return
            if step == "...":
                reason = "length"
            elif isinstance(step, str):
                tokens = self._tokens(step, settings)
                said += tokens
                deliver(Piece(step, tuple(tokens)))
        prompt = self._scored(prompt_ids, settings) if settings.prompt_logprobs else ()
        deliver(
            Answer(
                text="".join(step for step in script if isinstance(step, str) and step != "..."),
                num_prompt_tokens=len(prompt_ids),
                num_new_tokens=len(said),
                finish_reason=reason,
                tokens=tuple(said),
                prompt_tokens=tuple(prompt),
            )
        )

    def _tokens(self, text: str, settings: Settings) -> list[Token]:
        return [self._token(i, settings) for i in self.tokenizer.encode(text, add_special_tokens=False)]

    def _scored(self, ids, settings) -> list[Token]:
        return [Token(ids[0]), *(self._token(i, settings) for i in ids[1:])]

    def _token(self, token_id: int, settings: Settings) -> Token:
        """Its log-probability is -0.5, and the next id is the alternative with -1.5."""
        if settings.num_logprobs is None:
            return Token(token_id)
        return Token(token_id, -0.5, ((token_id, -0.5), (token_id + 1, -1.5))[: settings.num_logprobs])

    def close(self) -> None:
        pass


def chat_model(script: Callable[[str], Script] | None = None, template: str = "qwen", **changes: Any) -> ChatModel:
    """Answers `ok` unless a script says otherwise."""
    engine = ScriptedEngine(script or (lambda prompt: ["ok"]))
    chosen = get_template(template)
    return ChatModel(
        **{
            "name": "tiny",
            "tokenizer": engine.tokenizer,
            "texts": TokenTexts(engine.tokenizer),
            "num_positions": 4096,
            "vocab_size": 320,
            "created": 1,
            "engine": engine,
            "prompting": TemplatePrompting(chosen, Encoder(engine.tokenizer)),
            "settings": Settings(max_new_tokens=50),
            "call_syntax": chosen.call_syntax,
            "thinking_tags": chosen.thinking_tags if chosen.reasons else None,
            **changes,
        }
    )


@contextlib.contextmanager
def serving(model: Any, **options: Any) -> Iterator[tuple[str, Any]]:
    """(address of the server, what its routes share). `model` None: it is still loading."""
    app, service = build(ServerOptions(**{"host": "127.0.0.1", **options}))
    service.model = model
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", ws="none", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def last_question(prompt: str) -> str:
    """The text of the last user message in a prompt of the format qwen."""
    return prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
