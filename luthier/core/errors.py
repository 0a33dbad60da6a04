"""Every error that a user can cause, as one tree. The CLI catches `LuthierError` and nothing else.

LuthierError                exit status 1
  InvalidInput              exit status 2: what the user gave is wrong
    ConfigError             the run file or an override; carries all problems
    DataError               dataset_info.json, a data file, or no usable row
    ModelError              the model folder, adapter or GGUF file
    OutputError             the output folder
    MissingExtra            an optional library is not installed
    UnknownVariant          a name that no file provides
  RunFailed                 the run itself went wrong (disk full, loss not finite, ...)
    DeviceFailed            the accelerator computes nothing more in this process
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_NUMBERED = re.compile(r"\b(message|tool|call|part|item|pair|line|column|char) \d+")
"""A place inside a row."""


class LuthierError(Exception):
    """Base of all errors that the CLI prints without a traceback. The message names what, where, why and the remedy."""

    exit_status = 1


class RunFailed(LuthierError):
    """The input was valid, but the run could not be completed."""


class DeviceFailed(RunFailed):
    """The accelerator computes nothing more in this process, so going on would only repeat the error."""


class InvalidInput(LuthierError, ValueError):
    """What the user gave is wrong."""

    exit_status = 2


class DataError(InvalidInput):
    """A dataset cannot be used."""


class ModelError(InvalidInput):
    """A model, tokenizer or adapter cannot be used."""


class OutputError(InvalidInput):
    """The output folder cannot be used."""


class MissingExtra(InvalidInput):
    """An optional library is needed and not installed. See `luthier.core.versions.require`."""


class UnknownVariant(InvalidInput):
    """A name that no file in the variant's folder provides."""


class RowError(ValueError):
    """One row of a dataset cannot be used; the text is the reason. Counted by the ledger, never shown as a crash.

    `quoted`: the parts of the text that come from the row, in order. They are no part of the kind of the reason.
    """

    def __init__(self, reason: str, *quoted: str) -> None:
        super().__init__(reason)
        self.quoted = quoted

    @property
    def kind(self) -> str:
        """The reason without what differs from row to row: quoted data, and the numbers of messages and positions."""
        kind = str(self)
        for part in reversed(self.quoted):
            kind = "…".join(kind.rsplit(part, 1))
        return _NUMBERED.sub(r"\1 …", kind)


class RoleFault(RowError):
    """The roles of a conversation do not alternate."""


class ToolFault(RowError):
    """Tools or tool calls are not valid JSON of the expected form."""


class MediaFault(RowError):
    """An image, video or audio file is missing."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in what the user wrote. Leaf code fills in key, reason and remedy; the loader adds the rest."""

    key: str
    reason: str
    remedy: str = ""
    value: Any = None
    has_value: bool = False
    file: str = ""
    line: int | None = None

    def __str__(self) -> str:
        where = ":".join(str(part) for part in (self.file, self.line) if part)
        subject = f"{self.key}: {_as_written(self.value)}" if self.has_value else self.key
        text = f"{where}: {subject}: {self.reason}" if where else f"{subject}: {self.reason}"
        return f"{text} -> {self.remedy}" if self.remedy else text


def _as_written(value: Any) -> str:
    """A value as YAML writes it: `null`, `true` and `false` differ from Python."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)


class ConfigError(InvalidInput):
    """Problems in a run file, its overrides and what they point to, all at once. The message does not hold warnings."""

    def __init__(self, source: str, problems: Iterable[Problem], warnings: Iterable[Problem] = ()) -> None:
        self.source, self.problems, self.warnings = source, tuple(problems), tuple(warnings)
        count = len(self.problems)
        head = f"{source}: {count} problem{'s' if count > 1 else ''}"
        super().__init__("\n  ".join([head, *map(str, self.problems)]))
