"""From decoded values to the text of a run file that gives the same values again."""

from collections.abc import Mapping
from typing import Any

import yaml

from luthier.config.decode import FLOAT_TAG, FLOAT_WITHOUT_DOT, SIGN_OR_DIGIT


class _Dumper(yaml.SafeDumper):
    """Safe YAML as the loader of run files reads it: the text `1e-4` gets quotes."""


_Dumper.add_implicit_resolver(FLOAT_TAG, FLOAT_WITHOUT_DOT, SIGN_OR_DIGIT)


def to_yaml(value: Any) -> str:
    """Plain values as a document of YAML."""
    return str(yaml.dump(value, Dumper=_Dumper, allow_unicode=True, sort_keys=False))


def escaped(value: Any) -> Any:
    """`value` with every `${` escaped, which has been resolved and must not be looked up again."""
    if isinstance(value, str):
        return value.replace("${", "\\${")
    if isinstance(value, list | tuple):
        return [escaped(item) for item in value]
    return {name: escaped(item) for name, item in value.items()} if isinstance(value, Mapping) else value
