"""The Modelfile for `ollama create`: weights, chat format, stop words.

Templates of Ollama are Go templates. Tools and thoughts are left out, since Ollama handles both itself.
"""

import json

from luthier.data.templates import CONTENT, Slot, Special, Template, Token

_NUM_CTX_TOKENS = 4096


def modelfile(template: Template, *, bos_token: str | None, eos_token: str | None, source: str = ".") -> str:
    """The text of a Modelfile. `source`: the folder of the weights or a GGUF file, relative to the Modelfile.

    The tokens are those of the tokenizer, None if it has none.
    """
    own = {"bos": bos_token or "", "eos": eos_token or ""}
    lines = ["# Made by luthier.", "", f"FROM {source}", "", f'TEMPLATE """{_go_template(template, own)}"""', ""]
    if template.default_system:
        lines += [f'SYSTEM """{template.default_system}"""', ""]
    stops = dict.fromkeys(word for word in (eos_token, *template.stop_words) if word)
    lines += [f"PARAMETER stop {json.dumps(word, ensure_ascii=False)}" for word in stops]
    return "\n".join([*lines, f"PARAMETER num_ctx {_NUM_CTX_TOKENS}"]) + "\n"


def _go_template(template: Template, own: dict[str, str]) -> str:
    prefix = _text(template.prefix, "", own)
    system = f"{{{{ if .System }}}}{_text(template.system, '{{ .System }}', own)}{{{{ end }}}}"
    user, assistant = _text(template.user, "{{ .Content }}", own), _text(template.assistant, "{{ .Content }}", own)
    first = ""
    if template.kind == "llama2":
        head = _text(template.system, "{{ $.System }}", own)
        content = f"{{{{ if and $first $.System }}}}{head}{{{{ end }}}}{{{{ $first = false }}}}{{{{ .Content }}}}"
        system, first, user = "", "{{ $first := true }}", _text(template.user, content, own)
    turns = f'{{{{ if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{assistant}{{{{ end }}}}'
    return f"{prefix}{first}{system}{{{{ range .Messages }}}}{turns}{{{{ end }}}}"


def _text(slot: Slot, content: str, own: dict[str, str]) -> str:
    parts = []
    for piece in slot:
        match piece:
            case Special(kind=kind):
                parts.append(own[kind])
            case Token(text=text):
                parts.append(text)
            case str():
                parts.append(piece.replace(CONTENT, content))
    return "".join(parts)
