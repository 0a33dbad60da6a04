"""Runs a model's own chat template, a Jinja program that comes with the model and may fail in any way.

A tokenizer may hold several named templates. As in transformers, `tool_use` runs if there are tools, else `default`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from luthier.core.errors import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OpenAIMessage = dict[str, Any]
_MAX_SHOWN_CHARS = 300
_QUOTED = re.compile(r"\b\d+\b|'[^']*'|\"[^\"]*\"|`[^`]*`")
"""What the message of a template may quote from a row."""
_FAULTS = (
    ArithmeticError,  # {{ 1 // 0 }}, and a range() beyond the limit of the sandbox
    AssertionError,  # inside Jinja
    AttributeError,  # a method of another type
    ImportError,  # a Jinja that transformers finds too old; {% import %}
    LookupError,  # KeyError, IndexError, and an unknown text encoding
    MemoryError,  # {{ 'x' * 10 ** 15 }}
    NameError,
    RuntimeError,  # RecursionError, a dictionary that changes while it is read
    StopIteration,
    SyntaxError,  # more nested blocks than Python compiles
    TypeError,
    ValueError,  # int('x'), a date that strftime cannot write, UnicodeError
)
"""Every family of errors that the expressions, filters, tests and methods of a template can raise, besides Jinja's own
`TemplateError`. Left out are errors of files, processes and the keyboard, which a template has no access to."""


def function_call(name: str, arguments: Any, call_id: str = "") -> dict[str, Any]:
    """A call as OpenAI's API has it; without an id if that is empty."""
    function = {"name": name, "arguments": arguments}
    return {**({"id": call_id} if call_id else {}), "type": "function", "function": function}


def source(tokenizer: "PreTrainedTokenizerBase", *, has_tools: bool) -> str:
    """The template that runs for a conversation with or without tools. Raises `RowError` if the model has none."""
    named = tokenizer.chat_template
    if not isinstance(named, dict):
        assert named is not None, "asked only for models with a chat template"
        return str(named)
    name = "tool_use" if has_tools and "tool_use" in named else "default"
    if name not in named:
        raise RowError(
            f"the model has a chat template named {' and one named '.join(sorted(named))}, but none named default, so"
            " none for conversations without tools -> name a format with `template`"
        )
    return str(named[name])


def run(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[OpenAIMessage],
    tools: Sequence[Any] | None = None,
    *,
    asks: bool,
    switches: Mapping[str, Any],
) -> str:
    """The text that the template writes. `asks`: with the generation prompt; `switches`: further variables.

    Raises `RowError` for a conversation at which the template stops, whatever the error is.
    """
    from jinja2 import TemplateError

    chosen = source(tokenizer, has_tools=tools is not None)
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools is not None else None,
                chat_template=chosen,
                add_generation_prompt=asks,
                tokenize=False,
                **switches,
            )
        )
    except TemplateError as fault:
        text = _shown(fault)
        quoted = _QUOTED.findall(text)
        raise RowError(f"the model's own chat template refuses the conversation: {text}", *quoted) from fault
    except _FAULTS as fault:
        text = _shown(fault)
        quoted = _QUOTED.findall(text)
        kind = type(fault).__name__
        raise RowError(f"the model's own chat template fails with {kind}: {text}", *quoted) from fault


def _shown(fault: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(fault).split())[:_MAX_SHOWN_CHARS]
