"""The run file of a process that this one starts: the keys of a checked run as text, without its secrets."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from luthier.config.encode import escaped, to_yaml
from luthier.config.masking import is_secret


@dataclass(frozen=True, slots=True)
class RunFile:
    text: str
    """YAML. A secret is `${oc.env:NAME}`, so no file on disk holds it."""
    environment: Mapping[str, str]
    """NAME -> secret, for the process that reads the file."""

    @property
    def keys(self) -> dict[str, Any]:
        """As a process reads them, before interpolation."""
        read: dict[str, Any] = yaml.safe_load(self.text)
        return read


def run_file(keys: Mapping[str, Any]) -> RunFile:
    """`keys`: decoded ones, such as `Run.given`. Every `${` in a text is escaped, since it has been resolved once."""
    secrets = dict(_secrets(keys))
    shown = {name: escaped(value) for name, value in keys.items()}
    shown |= {name: f"${{oc.env:{variable(name)}}}" for name in secrets}
    return RunFile(to_yaml(shown), {variable(name): secret for name, secret in secrets.items()})


def variable(key: str) -> str:
    """The environment variable that hands down the secret `key`."""
    return f"LUTHIER_{key.upper()}"


def _secrets(keys: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in keys.items():
        if is_secret(name) and value is not None:
            yield name, str(value)
