"""The program `luthier`: finds the function of a command, calls it, and turns errors into exit statuses.

    0 done   1 the run failed   2 what the user gave is wrong   130 interrupted

Every import is inside a function, so that `luthier version` loads nothing else.
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from luthier.core.ending import QuickEnd

COMMANDS = {
    "train": ("RUN [key=value ...]", "run a training stage"),
    "check": (
        "RUN [key=value ...] [--for train|chat|export|eval]",
        "find every problem of a run file and its datasets",
    ),
    "sweep": ("RUN key=a,b [key=value ...]", "train every combination of these values, with one table at the end"),
    "plan": (
        "RUN [key=value ...] [--processes N[,N ...]] [--accelerator 80GB] [--json | --table]",
        "tell work, memory and time of a run before any weight is loaded",
    ),
    "data": (
        "RUN [--limit N] [--split train|eval] [--row K] [--json | --html FILE | --doctor [--strict]]",
        "show the tokenized rows, or find what is wrong with the datasets",
    ),
    "template": (
        "list | show NAME | render NAME FILE | check MODEL [NAME] [--data RUN] [--rows N] [--json]",
        "list and render chat formats; compare training with what a server sends",
    ),
    "chat": ("RUN [--once TEXT]", "talk to a model in the terminal"),
    "api": ("RUN", "serve a model over HTTP to every OpenAI client"),
    "webchat": ("RUN", "talk to a model in a browser"),
    "webui": ("[--host H] [--port P] [--root DIR]", "start, watch, compare and try runs in a browser"),
    "export": ("RUN", "merge adapters, quantize, write a model folder"),
    "eval": ("RUN task=TASK [key=value ...]", "measure a model, and how much better it is than its base"),
    "expand": ("MODEL OUT --blocks N", "insert blocks that are the identity at first, for use_llama_pro"),
    "verify": ("DIR", "compare a folder with its manifest"),
    "schema": ("", "print the JSON Schema of a run file"),
    "explain": ("KEY", "show what a key does, its type, default and rules"),
    "env": ("", "list the versions to name in a bug report"),
    "version": ("", "print the version"),
    "help": ("[COMMAND]", "print this list, or the help of one command"),
}
"""Command -> its arguments, and what it does. `luthier.run.<command>` has `main(argv) -> exit status`."""

WITH_OPTIONS = ("data", "template", "webui", "expand", "verify")
"""Commands whose own parser prints the help, with every option."""

OF_V1 = {"sft": "train", "dpo": "train", "rm": "train", "merge": "export"}
"""Command of LLaMA-Factory's v1 -> command; the key `stage` decides what `train` trains."""

LEAVING_NOTHING = ("plan", "chat")
"""Commands that load PyTorch and have written all that they write when they return."""


def usage() -> str:
    lines = ["usage: luthier COMMAND ...", ""]
    lines += [f"  {name:<9} {summary}" for name, (_, summary) in COMMANDS.items()]
    lines += [
        "",
        "RUN is a YAML or JSON file; key=value after it overrides, and --key value flags work without a file too.",
    ]
    lines += ["`luthier COMMAND --help` says more about one command. llamafactory-cli and lmf name the same program."]
    return "\n".join(lines)


def command_usage(name: str) -> str:
    words, summary = COMMANDS[name]
    text = f"usage: luthier {name} {words}".rstrip() + f"\n\n{summary[0].upper()}{summary[1:]}."
    if words.startswith("RUN"):
        text += "\n\n`luthier explain KEY` says what a key of RUN does; docs/reference/keys.md lists them all."
    return text


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit status of the process."""
    words = sys.argv[1:] if argv is None else argv
    _repair_streams()
    end = _quick_end() if argv is None else None
    try:
        status = _dispatch(words)
        sys.stdout.flush()
        if end is not None and words and ends_quickly(words[0]):
            end.status = status
        return status
    except BrokenPipeError:
        # The reader, e.g. `head`, has closed the pipe.
        _forget_output()
        return 0
    except OSError as fault:
        import errno

        if fault.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _forget_output()
        where = fault.filename or "standard output"
        print(f"luthier: {where}: cannot be written ({fault.strerror}) -> free some space", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("luthier: interrupted", file=sys.stderr)
        if end is not None:
            end.status = 130
        return 130


def ends_quickly(command: str) -> bool:
    """Without taking apart what is imported; for one of several processes of `train`, `core/ending.py` says why."""
    import os

    if OF_V1.get(command, command) == "train":
        return os.environ.get("WORLD_SIZE", "1") != "1"
    return command in LEAVING_NOTHING


def _quick_end() -> "QuickEnd":
    from luthier.core.ending import QuickEnd

    return QuickEnd()


def _repair_streams() -> None:
    """Replace closed streams (`>&-`) by the null device, and let stdout escape what it cannot encode."""
    import io
    import os

    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  # open until the process ends
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _forget_output() -> None:
    """Point stdout to the null device; otherwise Python reports the error again when it closes stdout."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(words: list[str]) -> int:
    name, rest = (words[0], words[1:]) if words else ("help", [])
    name = {"-h": "help", "--help": "help", "-v": "version", "--version": "version"}.get(name, name)
    if name == "help":
        return _help(rest)
    if name == "version":
        from luthier import __version__

        print(f"luthier {__version__}")
        return 0
    if name not in COMMANDS:
        return _refuse(name)
    if "--help" in rest or "-h" in rest:
        return _command_help(name, rest)
    if sys.platform == "win32":  # signals, locks of files and processes are those of POSIX
        print("luthier: Windows is not supported -> run it in the Windows Subsystem for Linux (WSL)", file=sys.stderr)
        return 2
    return _run(name, rest)


def _help(rest: list[str]) -> int:
    if rest and rest[0] in COMMANDS:
        return _command_help(rest[0], [*rest[1:], "--help"])
    if rest and not rest[0].startswith("-"):
        return _refuse(rest[0])
    print(usage())
    return 0


def _command_help(name: str, rest: list[str]) -> int:
    if name not in WITH_OPTIONS:
        print(command_usage(name))
        return 0
    try:
        return _run(name, rest)
    except SystemExit as done:  # how argparse ends after it has printed the help
        return int(done.code or 0)


def _refuse(name: str) -> int:
    """Say that there is no such command. Returns the exit status."""
    print(f"luthier: {_unknown(name)}", file=sys.stderr)
    return 2


def _unknown(name: str) -> str:
    from luthier.core.registry import did_you_mean

    if name in OF_V1:
        stage = f" with stage: {name}" if OF_V1[name] == "train" else ""
        return f"`{name}` is a command of v1 of LLaMA-Factory -> use `{OF_V1[name]}`{stage}"
    hint = did_you_mean(name, COMMANDS, lambda command: f"`{command}`")
    return f"unknown command `{name}`{'; ' if hint else ''}{hint} (`luthier help` lists them)"


def _run(name: str, rest: list[str]) -> int:
    import importlib
    import os

    from luthier.core.errors import ConfigError, LuthierError
    from luthier.core.log import set_up, warn
    from luthier.model.compat import slow_imports

    try:
        os.getcwd()
    except FileNotFoundError:
        print("luthier: the current folder no longer exists -> change to another one", file=sys.stderr)
        return 2
    slow_imports.install()
    try:
        set_up()
        status: int = importlib.import_module(f"luthier.run.{name}").main(rest)
        return status
    except LuthierError as error:
        for warning in error.warnings if isinstance(error, ConfigError) else ():
            warn(str(warning))
        if os.environ.get("LUTHIER_DEBUG") == "1":
            import traceback

            traceback.print_exc()
        print(f"luthier: {error}", file=sys.stderr)
        return error.exit_status
