"""The Modelfile for `ollama create`: weights, chat format, stop words.

Templates of Ollama are Go templates. Tools and thoughts are left out, since Ollama handles both itself.

A Modelfile has no escapes. A text between triple quotes ends at the first line that ends with triple quotes, and
characters that are not printable are dropped (parser/parser.go of Ollama). The string literals of Go templates have
escapes, so a text that a Modelfile cannot hold stands in the template.
"""

import re
from itertools import groupby

from luthier.core.errors import InvalidInput
from luthier.data.templates import CONTENT, Slot, Special, Template, Token

_NUM_CTX_TOKENS = 4096


def modelfile(template: Template, *, bos_token: str | None, eos_token: str | None, source: str = ".") -> str:
    """The text of a Modelfile. `source`: the folder of the weights or a GGUF file, relative to the Modelfile.

    The tokens are those of the tokenizer, None if it has none. Raises `InvalidInput` for a stop word that cannot be
    written.
    """
    default, is_held = template.default_system, _is_held(template.default_system)
    own = {"bos": bos_token or "", "eos": eos_token or ""}
    lines = [
        "# Made by luthier.",
        "",
        f"FROM {source}",
        "",
        f'TEMPLATE """{_go_template(template, own, "" if is_held else default)}"""',
        "",
    ]
    if default and is_held:
        lines += [f'SYSTEM """{default}"""', ""]
    stops = dict.fromkeys(word for word in (eos_token, *template.stop_words) if word)
    lines += [f"PARAMETER stop {_quoted(word)}" for word in stops]
    return "\n".join([*lines, f"PARAMETER num_ctx {_NUM_CTX_TOKENS}"]) + "\n"


def _quoted(word: str) -> str:
    if not _is_held(word):
        raise InvalidInput(
            f"a Modelfile cannot hold the stop word {word!r}: it drops characters that are not printable"
        )
    return f'"""{word}"""' if '"' in word or "\n" in word else f'"{word}"'


def _is_held(text: str) -> bool:
    """Whether a Modelfile can hold the text between triple quotes."""
    return all(map(_is_kept, text)) and not re.search(r'"""[ \t]*\n', text)


def _is_kept(char: str) -> bool:
    return char.isprintable() or char in "\n\t"


def _literal(text: str) -> str:
    """A string literal of Go in one line."""
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n"}
    return '"' + "".join(escapes.get(c, c if c.isprintable() else f"\\U{ord(c):08x}") for c in text) + '"'


def _as_text(text: str) -> str:
    """The text in a Go template, with literals for what would open an action, end the text or be dropped."""
    parts = []
    for is_plain, chars in groupby(text, lambda char: char not in '"{' and _is_kept(char)):
        part = "".join(chars)
        parts.append(part if is_plain else f"{{{{ {_literal(part)} }}}}")
    return "".join(parts)


def _go_template(template: Template, own: dict[str, str], default_system: str) -> str:
    """`default_system`: the text that stands in the template, or empty."""
    opening, given, within = "", ".System", "$.System"  # `within`: in `range`, where the dot is a message
    if default_system:
        literal = _literal(default_system)
        opening = f"{{{{ $system := .System }}}}{{{{ if not $system }}}}{{{{ $system = {literal} }}}}{{{{ end }}}}"
        given = within = "$system"
    prefix = _text(template.prefix, "", own)
    system = f"{{{{ if {given} }}}}{_text(template.system, f'{{{{ {given} }}}}', own)}{{{{ end }}}}"
    user, assistant = _text(template.user, "{{ .Content }}", own), _text(template.assistant, "{{ .Content }}", own)
    first = ""
    if template.kind == "llama2":
        head = _text(template.system, f"{{{{ {within} }}}}", own)
        content = f"{{{{ if and $first {within} }}}}{head}{{{{ end }}}}{{{{ $first = false }}}}{{{{ .Content }}}}"
        system, first, user = "", "{{ $first := true }}", _text(template.user, content, own)
    turns = f'{{{{ if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{assistant}{{{{ end }}}}'
    return f"{opening}{prefix}{first}{system}{{{{ range .Messages }}}}{turns}{{{{ end }}}}"


def _text(slot: Slot, content: str, own: dict[str, str]) -> str:
    parts = []
    for piece in slot:
        match piece:
            case Special(kind=kind):
                parts.append(_as_text(own[kind]))
            case Token(text=text):
                parts.append(_as_text(text))
            case str():
                parts.append(content.join(map(_as_text, piece.split(CONTENT))))
    return "".join(parts)
