"""`luthier chat RUN`: a conversation in the terminal, or with `--once TEXT` one answer and nothing else on stdout."""

import contextlib
import importlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.core.errors import DeviceFailed, InvalidInput, LuthierError
from luthier.core.log import info
from luthier.core.registry import did_you_mean

if TYPE_CHECKING:
    from luthier.data.types import ToolCall
    from luthier.infer.reading import Part
    from luthier.infer.session import ChatSession
    from luthier.infer.types import Answer

HELP = """\
/clear         forget the conversation (so does `clear`)
/retry         answer the last question again
/system TEXT   set the system text; without TEXT remove it
/tools FILE    give the model the tools in a JSON file; without FILE remove them
/image FILE    show the model an image before the next question; several may follow each other
/video FILE    a video
/audio FILE    let it hear a file
/save FILE     add the conversation to FILE (.jsonl) as a row of training data, format openai
/help          this list
exit           leave (so does the end of input)
A line that ends with \\ goes on in the next line. A line \"\"\" begins a text of several lines, and another one
ends it.
Ctrl-C stops an answer. A line that begins with a space is sent unchanged."""
_FILES = {"image": "photo.jpg", "video": "clip.mp4", "audio": "voice.wav"}
QUOTES = '"""'


def main(argv: list[str]) -> int:
    from luthier.config.load import read_source
    from luthier.config.runs import InferRun
    from luthier.workflow.chat import open_chat
    from luthier.workflow.preflight import load_checked, tell_warnings

    words, question = split_once(argv)
    run = load_checked("infer", read_source(words), begins=True)
    assert isinstance(run, InferRun)
    tell_warnings(run)
    session = open_chat(run)
    if question is None:
        Terminal(session).talk()
    else:
        print_answer(session, question)
    return 0


def split_once(argv: list[str]) -> tuple[list[str], str | None]:
    """(the other words, TEXT of `--once TEXT` or `--once=TEXT`). The others are the run file, overrides and flags."""
    words, question = [], None
    rest = iter(argv)
    for word in rest:
        if word == "--once":
            question = next(rest, "")
        elif word.startswith("--once="):
            question = word.removeprefix("--once=")
        else:
            words.append(word)
    if question is not None and not question.strip():
        raise InvalidInput('--once: the question is missing: luthier chat RUN --once "What is the capital of France?"')
    return words, question


def print_answer(session: "ChatSession", question: str) -> "Answer":
    """Stream an answer to stdout. Ctrl-C stops the answer and then raises `KeyboardInterrupt`."""
    pieces = session.stream(question)
    try:
        while True:
            try:
                print(next(pieces), end="", flush=True)
            except StopIteration as done:
                return done.value
    finally:
        pieces.close()
        print(flush=True)


def print_parts(parts: "Generator[Part, None, Answer]", *, dims: bool) -> "Answer":
    """Stream an answer to stdout with its thought apart. The caller prints the calls. `dims`: thoughts are gray."""
    from luthier.infer.reading import Thought, Words

    gray, plain = ("\033[2m", "\033[0m") if dims else ("", "")
    speaker = ""
    try:
        while True:
            try:
                part = next(parts)
            except StopIteration as done:
                return done.value
            if not isinstance(part, Thought | Words):
                continue
            who = "Thought: " if isinstance(part, Thought) else "Assistant: "
            if who != speaker:
                print("\n" * bool(speaker) + who, end="")
                speaker = who
            print(f"{gray}{part.text}{plain}" if isinstance(part, Thought) else part.text, end="", flush=True)
    finally:
        parts.close()
        print("" if speaker else "Assistant: ", flush=True)


class Terminal:
    """Reads lines, answers them, and runs the commands in `HELP`.

    If the input is not a terminal (a pipe, a file), the lines are printed too, so that the output is a transcript.
    """

    def __init__(self, session: "ChatSession") -> None:
        self.session = session
        self.is_interactive = sys.stdin.isatty()
        self._commands: dict[str, Callable[[str], None]] = {
            "/clear": self._clear,
            "/retry": self._retry,
            "/system": self._set_system,
            "/tools": self._set_tools,
            **{f"/{name}": partial(self._show, name) for name in ("image", "video", "audio")},
            "/save": self._save,
            "/help": lambda _: print(HELP),
        }

    def talk(self) -> None:
        """Read lines until `exit` or the end of input. An error in one line is printed, and the next line is read.

        Raises `DeviceFailed`, after which no line could be answered.
        """
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is refused alone
        if self.is_interactive:
            with contextlib.suppress(ImportError):  # not on every system; gives `input` line editing and a history
                importlib.import_module("readline")
            info("`clear` forgets the conversation, `exit` leaves, `/help` lists more")
        while (line := self._read_text()) is not None and line.strip() != "exit":
            try:
                self._handle(line)
            except DeviceFailed:
                raise
            except LuthierError as error:
                info(f"error: {error}")
            except KeyboardInterrupt:
                info("(stopped)")

    def _read_text(self) -> str | None:
        """One line, or several that belong together; None at the end of input."""
        line = self._read_line("\nTool: " if self.session.conversation.awaits_tool_result else "\nUser: ")
        if line is None:
            return None
        lines = [line]
        if line.strip() == QUOTES:
            lines = []
            while (line := self._read_line("... ")) is not None and line.strip() != QUOTES:
                lines.append(line)
            return " " + "\n".join(lines)  # the space: it is sent unchanged
        while lines[-1].endswith("\\") and (line := self._read_line("... ")) is not None:
            lines = [*lines[:-1], lines[-1].removesuffix("\\"), line]
        return "\n".join(lines)

    def _read_line(self, prompt: str) -> str | None:
        try:
            line = input(prompt)
        except EOFError:
            print()
            return None
        if not self.is_interactive:
            print(line.encode(errors="replace").decode())
        return line

    def _handle(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if not line.strip():
            return
        if line.strip() == "clear":
            self._clear("")
        elif command in self._commands:
            self._commands[command](rest.strip())
        elif command.startswith("/") and (hint := did_you_mean(command, self._commands)):
            raise InvalidInput(f"there is no command {command}; {hint} (begin the line with a space to send it)")
        else:
            self._answer(line.strip())

    def _answer(self, question: str) -> None:
        start = time.monotonic()
        answer = print_parts(self.session.stream_parts(question), dims=self.is_interactive and sys.stdout.isatty())
        for call in self.session.tool_calls:
            print(describe_call(call))
        if self.is_interactive:
            rate = answer.num_new_tokens / max(time.monotonic() - start, 1e-9)
            info(f"({answer.num_new_tokens} tokens, {rate:.1f} tokens/s)")

    def _clear(self, _: str) -> None:
        self.session.clear()
        info("The conversation is forgotten.")

    def _retry(self, _: str) -> None:
        self._answer(self.session.conversation.take_back())

    def _show(self, kind: str, name: str) -> None:
        if not name:
            raise InvalidInput(f"/{kind}: the file is missing: /{kind} {_FILES[kind]}")
        self.session.conversation.show(name, kind)
        info(f"The next question is about {name}.")

    def _save(self, name: str) -> None:
        if not name:
            raise InvalidInput("/save: the file is missing: /save conversations.jsonl")
        row = json.dumps(self.session.conversation.as_row(), ensure_ascii=False)
        try:
            with open(os.path.expanduser(name), "a", encoding="utf-8") as file:
                file.write(row + "\n")
        except (OSError, ValueError) as fault:  # ValueError: a null character in the name
            raise InvalidInput(f"{name}: cannot be written ({fault})") from fault
        info(f"{name}: one row added, to be read with `formatting: openai` in dataset_info.json")

    def _set_system(self, text: str) -> None:
        self.session.conversation.system = text or None
        info("The system text is set." if text else "The system text is removed.")

    def _set_tools(self, name: str) -> None:
        from luthier.infer.conversation import read_tools

        self.session.conversation.tools = read_tools(read_text(name)) if name else ""
        info(f"The model may use the tools of {name}." if name else "The tools are removed.")


def describe_call(call: "ToolCall") -> str:
    """`-> get_weather(city='Paris')`"""
    return f"-> {call.name}({', '.join(f'{name}={value!r}' for name, value in call.arguments.items())})"


def read_text(name: str) -> str:
    try:
        return Path(os.path.expanduser(name)).read_text(encoding="utf-8")  # of Path it raises for an unknown user
    except (OSError, ValueError) as fault:  # ValueError: not UTF-8, or a null character in the name
        raise InvalidInput(f"{name}: cannot be read as a text file ({fault})") from fault
