"""The command `luthier`: finds the function of a command, calls it, and turns errors into exit statuses.

    0 done   1 the run failed   2 what the user gave is wrong   130 interrupted

Every import is inside a function, so that `luthier version` starts nothing else.
"""

import sys

COMMANDS = {
    "train": ("RUN [key=value ...]", "run a training stage"),
    "check": ("RUN [key=value ...] [--for train|chat|export]", "validate a run file and its datasets"),
    "data": (
        "RUN [--limit N] [--split train|eval] [--row K] [--json | --html FILE | --doctor [--strict]]",
        "show the tokenized rows, or examine the datasets",
    ),
    "template": (
        "list | show NAME | render NAME FILE | check MODEL [NAME] [--data RUN] [--rows N] [--json]",
        "the chat formats, and whether training with one equals what an inference server sends",
    ),
    "chat": ("RUN [--once TEXT]", "talk to a model in the terminal"),
    "export": ("RUN", "merge adapters and write a model folder"),
    "expand": ("MODEL OUT --blocks N", "insert blocks that change nothing yet, for use_llama_pro"),
    "verify": ("DIR", "compare a result with its manifest"),
    "schema": ("", "print the JSON Schema of a run file"),
    "explain": ("KEY", "say what a key does"),
    "env": ("", "list the versions of what luthier uses"),
    "version": ("", "print the version"),
    "help": ("[COMMAND]", "print this"),
}
"""Command -> its words, and what it does. `luthier.run.<command>` holds `main(argv) -> exit status`."""

LATER = ("plan", "api", "webchat", "webui", "eval")
"""Commands that this version does not have."""


def usage() -> str:
    lines = ["usage: luthier COMMAND ...", ""]
    lines += [f"  {name:<9} {summary}" for name, (_, summary) in COMMANDS.items()]
    lines += [
        "",
        "RUN is a YAML or JSON file; key=value after it overrides, and --key value flags work without a file too.",
    ]
    lines += [
        "`luthier COMMAND --help` says more about one command. llamafactory-cli is a second name of this program."
    ]
    return "\n".join(lines)


def command_usage(name: str) -> str:
    words, summary = COMMANDS[name]
    text = f"usage: luthier {name} {words}".rstrip() + f"\n\n{summary}"
    if words.startswith("RUN"):
        text += "\n\n`luthier explain KEY` says what a key of RUN does; docs/reference/keys.md lists them all."
    return text


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit status of the process."""
    words = sys.argv[1:] if argv is None else argv
    _mend_streams()
    try:
        status = _dispatch(words)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader, e.g. `head`, has seen enough.
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
        return 130


def _mend_streams() -> None:
    """A stream that was closed (`>&-`) takes or gives nothing; what stdout cannot spell is written as an escape."""
    import io
    import os

    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  # it lives as long as the process
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _forget_output() -> None:
    """Python would complain about it once more when it closes stdout."""
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
        print(f"luthier: {_unknown(name)}", file=sys.stderr)
        return 2
    if "--help" in rest or "-h" in rest:
        print(command_usage(name))
        return 0
    return _run(name, rest)


def _help(rest: list[str]) -> int:
    print(command_usage(rest[0]) if rest and rest[0] in COMMANDS else usage())
    return 0


def _unknown(name: str) -> str:
    if name in LATER:
        return f"the command `{name}` is not part of this version"
    from luthier.core.registry import did_you_mean

    hint = did_you_mean(name, COMMANDS, lambda command: f"`{command}`")
    return f"unknown command `{name}`{'; ' if hint else ''}{hint} (`luthier help` lists them)"


def _run(name: str, rest: list[str]) -> int:
    import importlib
    import os

    from luthier.core.errors import ConfigError, LuthierError
    from luthier.core.log import set_up, warn

    try:
        os.getcwd()
    except FileNotFoundError:
        print("luthier: the current folder is no longer there -> change to another one", file=sys.stderr)
        return 2
    set_up()
    try:
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
