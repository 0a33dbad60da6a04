"""List, show and render chat formats; check whether training equals inference. Only `check` needs a tokenizer."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, get_args

from luthier.core.errors import DataError, RowError
from luthier.core.registry import did_you_mean
from luthier.data.chat.render import as_text, render
from luthier.data.templates import Special, Template, Token, family_of, get_template, template_names
from luthier.data.types import ANSWERING, ASKING, Message, Role

_KEYS = {"id", "system", "tools", "messages", "enable_thinking"}


def main(argv: list[str]) -> int:
    """Return 0, or 1 if `check` found a difference or `render` a conversation that cannot be written.

    Raises for an unknown format or an unusable file.
    """
    parser = argparse.ArgumentParser(prog="luthier template", description=__doc__)
    words = parser.add_subparsers(dest="word", metavar="list | show | render | check", required=True)
    words.add_parser("list", help="list all formats with kind, tool syntax and file")
    words.add_parser("show", help="print all keys of one format").add_argument("name", metavar="NAME")
    renderer = words.add_parser("render", help="render the conversations of a JSON file, one JSON line each")
    renderer.add_argument("name", metavar="NAME")
    renderer.add_argument("file", metavar="FILE", type=Path)
    checker = words.add_parser("check", help="compare the token ids of training with those that a server sends")
    checker.add_argument("model", metavar="MODEL", help="a folder, a GGUF file or a hub id")
    checker.add_argument("name", metavar="NAME", nargs="?", help="the chat format used in training (default auto)")
    checker.add_argument(
        "--data", metavar="RUN", help="compare the rows of this run file instead of built-in conversations"
    )
    checker.add_argument("--rows", metavar="N", type=int, default=20, help="with --data: how many rows (default 20)")
    checker.add_argument("--json", action="store_true", help="print one JSON object")
    checker.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the model repository brings along"
    )
    asked = parser.parse_args(argv)
    if asked.word == "list":
        _list()
    elif asked.word == "show":
        print(show(get_template(asked.name)), end="")
    elif asked.word == "render":
        return _render(get_template(asked.name), asked.file)
    else:
        from luthier.workflow.template_check import check

        how = {"as_json": asked.json, "run_file": asked.data, "num_rows": asked.rows}
        return check(asked.model, asked.name, **how, trust_remote_code=asked.trust_remote_code)
    return 0


def _list() -> None:
    width = max(map(len, template_names()))
    for name in template_names():
        template = get_template(name)
        print(f"{name:{width}}  {template.kind:15}  tools: {template.tool_syntax:9}  {family_of(name)}.toml")


def _render(template: Template, file: Path) -> int:
    """Prints the conversations that can be written and names the others on stderr. Returns 2 if there are such."""
    status = 0
    for number, conversation in enumerate(read_conversations(file), start=1):
        name = f"conversation {number}"
        try:
            if problem := _problem(conversation):
                raise RowError(problem)
            name = f"conversation {conversation['id']!r}"
            line = json.dumps(render_conversation(template, conversation), ensure_ascii=False)
            line.encode()  # not possible with half of a surrogate pair
            print(line)
        except (RowError, UnicodeEncodeError) as error:
            print(f"luthier: {file}: {name}: {error}", file=sys.stderr)
            status = 2
    return status


def show(template: Template) -> str:
    """The format with all defaults, in the notation of the TOML files."""
    lines = [f"[{template.name}]  # {family_of(template.name)}.toml, with all defaults filled in"]
    for key, value in dataclasses.asdict(template).items():
        lines += [] if key == "name" else [f"{key} = {_toml(getattr(template, key), value)}"]
    return "\n".join(lines) + "\n"


def _toml(value: Any, plain: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(item, item) for item in value)}]"
    if isinstance(value, Special):
        return f'{{ special = "{value.kind}" }}'
    if isinstance(value, Token):
        return f"{{ token = {json.dumps(value.text, ensure_ascii=False)} }}"
    return json.dumps(plain, ensure_ascii=False)


def render_conversation(template: Template, conversation: dict[str, Any]) -> dict[str, Any]:
    """A conversation as training and inference write it, with <BOS> and <EOS> for the tokenizer's own tokens.

    `turns` holds the [prompt, answer] pairs of training; `inference_prompt` and `response` are the last turn at
    inference.
    """
    messages = tuple(Message(message["role"], message["content"]) for message in conversation["messages"])
    given: dict[str, Any] = {key: conversation[key] for key in ("system", "enable_thinking") if key in conversation}
    tools = conversation.get("tools", "")
    given["tools"] = "" if tools.strip() in ("", "null") else tools
    pairs = messages[: len(messages) // 2 * 2]
    turns = render(template, pairs, purpose="train", **given) if pairs else ()
    (last,) = render(template, messages, purpose="infer", **given)
    return {
        "template": template.name,
        "conversation": conversation["id"],
        "turns": [[as_text(turn.prompt), as_text(turn.answer)] for turn in turns],
        "inference_prompt": as_text(last.prompt),
        "response": as_text(last.answer),
    }


def read_conversations(file: Path) -> list[Any]:
    """The items of a JSON file, not checked. Raises `DataError` if it is missing, not JSON, or not a list."""
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8: {error}") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    try:
        conversations = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON: {error}") from error
    if not isinstance(conversations, list):
        raise DataError(f"{file}: holds {type(conversations).__name__}, not a list of conversations")
    return conversations


def _problem(conversation: Any) -> str | None:
    """What is wrong with the shape of a conversation, if anything."""
    if not isinstance(conversation, dict):
        return f"not an object but {type(conversation).__name__}"
    for key in conversation:
        if key not in _KEYS:
            hint = did_you_mean(key, _KEYS, repr)
            return f"unknown key {key!r}" + (f"; {hint}" if hint else "")
    for key in ("id", "messages"):
        if key not in conversation:
            return f"{key!r} is missing"
    for key in ("id", "system", "tools"):
        if not isinstance(conversation.get(key, ""), str):
            return f"{key!r} is not a text" + (" (the tools are JSON inside a text)" if key == "tools" else "")
    if not isinstance(conversation.get("enable_thinking"), bool | None):
        return "'enable_thinking' is not true, false or null"
    messages = conversation["messages"]
    if not isinstance(messages, list) or not messages:
        return "'messages' is not a list of messages"
    return next(filter(None, (_message_problem(message, i) for i, message in enumerate(messages))), None)


def _message_problem(message: Any, index: int) -> str | None:
    where = f"message {index + 1}"
    match message:
        case {"role": str(role), "content": str(), **rest}:
            if rest:
                return f"{where}: unknown key {next(iter(rest))!r}"
        case _:
            return f"{where} is not an object with the texts 'role' and 'content'"
    if role not in get_args(Role):
        return f"{where}: unknown role {role!r} (one of {', '.join(get_args(Role))})"
    wanted = ASKING if index % 2 == 0 else ANSWERING
    return None if role in wanted else f"{where}: the role is {role!r}, but must be {' or '.join(wanted)}"
