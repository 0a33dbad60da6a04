"""`luthier chat RUN`: a conversation in the terminal, or with `--once TEXT` one answer and nothing else on stdout."""

import contextlib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.core.errors import InvalidInput, LuthierError
from luthier.core.log import info, warn
from luthier.core.registry import did_you_mean

if TYPE_CHECKING:
    from luthier.data.types import ToolCall
    from luthier.infer.session import ChatSession

HELP = """\
clear          forget the conversation
exit           leave (so does the end of input)
/system TEXT   set the system text; without TEXT remove it
/tools FILE    give the model the tools in a JSON file; without FILE remove them
/help          this list
Ctrl-C stops an answer. A line that begins with a space is sent unchanged."""
COMMANDS = ("/system", "/tools", "/help")


def main(argv: list[str]) -> int:
    from luthier.config.load import read_source
    from luthier.config.runs import InferRun
    from luthier.workflow.chat import open_chat
    from luthier.workflow.preflight import load_checked

    words, question = split_once(argv)
    run = load_checked("infer", read_source(words), begins=True)
    assert isinstance(run, InferRun)
    for warning in run.warnings:
        warn(str(warning))
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


def print_answer(session: "ChatSession", question: str) -> None:
    """Stream an answer to stdout. Ctrl-C stops the answer and then raises `KeyboardInterrupt`."""
    try:
        for piece in session.stream(question):
            print(piece, end="", flush=True)
    finally:
        print(flush=True)


class Terminal:
    """Reads lines, answers them, and runs the commands in `HELP`.

    If the input is not a terminal (a pipe, a file), the lines are printed too, so that the output is a transcript.
    """

    def __init__(self, session: "ChatSession") -> None:
        self.session = session
        self.is_interactive = sys.stdin.isatty()
        self._commands: dict[str, Callable[[str], None]] = {
            "/system": self._set_system,
            "/tools": self._set_tools,
            "/help": lambda _: print(HELP),
        }

    def talk(self) -> None:
        """Read lines until `exit` or the end of input. An error in one line is printed, and the next line is read."""
        if self.is_interactive:
            with contextlib.suppress(ImportError):  # not on every system; gives `input` line editing and a history
                importlib.import_module("readline")
            info("`clear` forgets the conversation, `exit` leaves, `/help` lists more")
        while (line := self._read_line()) is not None and line.strip() != "exit":
            try:
                self._handle(line)
            except LuthierError as error:
                info(f"error: {error}")
            except KeyboardInterrupt:
                info("(stopped)")

    def _read_line(self) -> str | None:
        who = "Tool: " if self.session.conversation.awaits_tool_result else "User: "
        try:
            line = input(f"\n{who}")
        except EOFError:
            print()
            return None
        if not self.is_interactive:
            print(line)
        return line

    def _handle(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if not line.strip():
            return
        if line.strip() == "clear":
            self.session.clear()
            info("The conversation is forgotten.")
        elif command in self._commands:
            self._commands[command](rest.strip())
        elif command.startswith("/") and (hint := did_you_mean(command, self._commands)):
            raise InvalidInput(f"there is no command {command}; {hint} (begin the line with a space to send it)")
        else:
            self._answer(line.strip())

    def _answer(self, question: str) -> None:
        print("Assistant: ", end="", flush=True)
        print_answer(self.session, question)
        for call in self.session.tool_calls:
            print(describe_call(call))

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
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise InvalidInput(f"{name}: cannot be read as a text file ({fault})") from fault
