"""`${key}`, `${a.b}`, `${oc.env:NAME}` and `${oc.env:NAME,default}` inside values, as OmegaConf writes them.

A value that is one `${key}` takes the other key's value as it is; anything else becomes text. `\\${` is a plain `${`.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from luthier.config.decode import Misfit, Text
from luthier.config.source import Entry, Written
from luthier.core.errors import Problem
from luthier.core.registry import did_you_mean

INNERMOST = re.compile(r"(?<!\\)\$\{([^${}]*)\}")


def interpolate(written: Written, environment: Mapping[str, str]) -> None:
    """Replace every interpolation in `written`; what cannot be replaced becomes a problem."""
    resolved: dict[str, Entry] = {}
    for name, entry in written.entries.items():
        try:
            value = _Resolver(written.entries, environment).value(entry.value, (name,))
        except Misfit as misfit:
            written.problems.append(
                Problem(name, misfit.reason, misfit.remedy, entry.value, True, entry.file, entry.line)
            )
        else:
            resolved[name] = replace(entry, value=value)
    written.entries = resolved


class _Resolver:
    """Looks up values in `entries`, which may hold interpolations themselves."""

    def __init__(self, entries: Mapping[str, Entry], environment: Mapping[str, str]) -> None:
        self.entries, self.environment = entries, environment

    def value(self, value: Any, path: tuple[str, ...]) -> Any:
        """`value` with everything inside resolved. `path` are the keys being resolved, to notice a cycle."""
        if isinstance(value, str):
            return self._text(value, path) if "${" in value else value
        if isinstance(value, list | tuple):
            return [self.value(item, path) for item in value]
        if isinstance(value, Mapping):
            return {name: self.value(item, path) for name, item in value.items()}
        return value

    def _text(self, text: str, path: tuple[str, ...]) -> Any:
        while match := INNERMOST.search(text):
            found = self._lookup(match[1].strip(), path)
            if match.span() == (0, len(text)):
                return found
            shown = "null" if found is None else str(found).lower() if isinstance(found, bool) else str(found)
            shown = shown.replace("${", "\\${")  # it is the value of a key or a variable, and resolved already
            text = Text(text[: match.start()] + shown + text[match.end() :])
        if re.search(r"(?<!\\)\$\{", text):
            raise Misfit("holds a ${ without its }", "write \\${ for a plain ${")
        plain = text.replace("\\${", "${")
        return Text(plain) if isinstance(text, Text) else plain

    def _lookup(self, name: str, path: tuple[str, ...]) -> Any:
        resolver, colon, argument = name.partition(":")
        if colon:
            if resolver != "oc.env":
                raise Misfit(f"holds ${{{name}}}, and {resolver} is not known", "use ${oc.env:NAME} or ${key}")
            return self._variable(argument)
        top, *inner = name.split(".")
        if top in path:
            raise Misfit(f"refers to itself: {' -> '.join((*path, top))}")
        if top not in self.entries:
            remedy = did_you_mean(top, self.entries, lambda key: f"${{{key}}}")
            raise Misfit(f"refers to {name}, which is not given", remedy)
        value = self.value(self.entries[top].value, (*path, top))
        for step in inner:
            if not isinstance(value, Mapping) or step not in value:
                raise Misfit(f"refers to {name}, which is not given")
            value = value[step]
        return value

    def _variable(self, argument: str) -> Any:
        name, comma, default = (part.strip() for part in argument.partition(","))
        if name in self.environment:
            return Text(self.environment[name])
        if comma:
            return None if default == "null" else Text(default.strip("'\""))
        raise Misfit(
            f"the environment variable {name} is not set", f"set it, or write ${{oc.env:{name},default}} with a default"
        )
