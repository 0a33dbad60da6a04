"""Makes a Jinja chat template from the slots of a format, for tokenizers that have none or one to be replaced.

It renders the same text as `luthier.data.chat.render` for inference: system, user and assistant messages, results of
tools (role `tool`), and thinking with `enable_thinking` and `preserve_thinking`. It refuses tools and calls, whose
syntaxes are code.
"""

import re
from typing import TYPE_CHECKING

from luthier.data.templates import CONTENT, Slot, Special, Template, Token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ARGUMENTS = """\
{%- if tools %}{{ raise_exception('This chat template was made without tools.') }}{% endif -%}
{%- set system = SYSTEM -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
"""
_THINKING = """\
{%- set thinking = enable_thinking if enable_thinking is defined else true -%}
{%- set keep_thoughts = preserve_thinking is defined and preserve_thinking -%}
"""
_GIVEN_APART = """\
{%- if message['reasoning_content'] and enable_thinking is not false -%}
{%- set content = OPEN ~ message['reasoning_content'].strip('\\n') ~ CLOSE ~ content.lstrip('\\n') -%}
{%- endif -%}
"""
_WITHOUT_THOUGHT = """\
{%- set begun = content.lstrip() -%}
{%- set rest = begun[BEGIN|length:] -%}
{%- if begun.startswith(BEGIN) and END in rest -%}
{%- if (not loop.last and not keep_thoughts) or (loop.last and thinking is false) -%}
{%- set content = rest.split(END, 1)[1].lstrip('\\n') -%}
{%- endif -%}
{%- endif -%}
{%- if loop.last and not content.lstrip().startswith(BEGIN) -%}
{%- if END not in content or BEGIN in content.split(END, 1)[0] -%}
{{- EMPTY -}}
{%- endif -%}
{%- endif -%}
"""


def chat_template(template: Template) -> str | None:
    """The Jinja source for `tokenizer.chat_template`, or None for a format that text cannot express.

    Such a format has `Token` pieces (chatglm3, yuan): ids that may differ from the tokenization of their text.
    """
    slots = (template.prefix, template.system, template.user, template.assistant, template.observation)
    if any(isinstance(piece, Token) for slot in slots for piece in slot):
        return None
    system = _output(template.system, "system")
    user, tool = _output(template.user, "content"), _output(template.observation, "content")
    parts = [_ARGUMENTS.replace("SYSTEM", _literal(template.default_system))]
    if template.reasons:
        parts.append(_THINKING)
    parts.append(_output(template.prefix, "content"))
    if template.kind == "llama2":
        head = _expression(template.system, "system")
        opening = f"{{%- set content = {head} ~ content if loop.first and system else content -%}}\n"
    else:
        parts.append(f"{{%- if system -%}}\n{system}{{%- endif -%}}\n")
        opening = ""
    parts += [
        "{%- for message in messages -%}\n",
        "{%- set content = message['content'] -%}\n",
        f"{{%- if message['role'] == 'user' -%}}\n{opening}{user}",
        f"{{%- elif message['role'] == 'tool' -%}}\n{opening}{tool}",
        "{%- elif message['role'] != 'assistant' or message['tool_calls'] -%}\n",
        "{{- raise_exception('This chat template knows no role ' ~ message['role'] ~ ' and no tool calls.') -}}\n",
        f"{{%- else -%}}\n{_thought(template)}{_output(template.assistant, 'content')}",
        "{%- endif -%}\n{%- endfor -%}\n",
    ]
    if template.reasons:
        empty = _literal(template.empty_thought)
        parts.append(f"{{%- if add_generation_prompt and not thinking -%}}\n{{{{- {empty} -}}}}\n{{%- endif -%}}\n")
    return "".join(parts)


def _thought(template: Template) -> str:
    """Writes a thought that is given apart, and removes those of earlier answers.

    A last answer without a thought begins with an empty one.
    """
    opening, closing = template.thinking_tags
    values = {
        "OPEN": opening,
        "CLOSE": closing,
        "BEGIN": opening.strip(),
        "END": closing.strip(),
        "EMPTY": template.empty_thought,
    }
    program = _GIVEN_APART + _WITHOUT_THOUGHT if template.reasons else _GIVEN_APART
    return re.sub(r"\b(?:OPEN|CLOSE|BEGIN|END|EMPTY)\b", lambda name: _literal(values[name[0]]), program)


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def _expression(slot: Slot, variable: str) -> str:
    """A Jinja expression of the slot's text. `~` treats a token that the tokenizer lacks as empty."""
    parts: list[str] = []
    for piece in slot:
        if isinstance(piece, Special):
            parts.append(f"{piece.kind}_token")
        else:
            assert isinstance(piece, str) and "{{idx}}" not in piece, "no format numbers its turns"
            before, placeholder, after = piece.partition(CONTENT)
            parts += [_literal(text) for text in (before,) if text]
            parts += [variable] * bool(placeholder)
            parts += [_literal(text) for text in (after,) if text]
    return " ~ ".join(parts)


def _output(slot: Slot, variable: str) -> str:
    return f"{{{{- {_expression(slot, variable)} -}}}}\n" if slot else ""


def give_chat_template(tokenizer: "PreTrainedTokenizerBase", template: Template) -> None:
    """Set the tokenizer's chat template to that of the format, if it has none or the format replaces it."""
    if tokenizer.chat_template is None or template.replace_chat_template:
        text = chat_template(template)
        if text is not None:
            tokenizer.chat_template = text
