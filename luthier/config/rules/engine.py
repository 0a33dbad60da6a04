"""What a rule is, and the most common kinds of it.

`Rules` is also the type of the `check` of a stage or an adapter, so `luthier explain` can show what a key excludes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from luthier.core.errors import Problem


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that a run must not be. The first of `keys` is the one named in the message."""

    keys: tuple[str, ...]
    reason: str
    remedy: str
    broken: Callable[[Any], bool]
    """Whether this run breaks the rule."""
    only_warns: bool = False


class Rules(tuple[Rule, ...]):
    """Rules that are checked together; called with a run, they give the problems."""

    __slots__ = ()

    def __call__(self, run: Any) -> Iterator[Problem]:
        return self.broken_by(run, warnings=False)

    def broken_by(self, run: Any, *, warnings: bool) -> Iterator[Problem]:
        for rule in self:
            if rule.only_warns == warnings and rule.broken(run):
                yield Problem(rule.keys[0], rule.reason, rule.remedy)


def at_least(section: str, key: str, minimum: float) -> Rule:
    """The number `key` of the config object `section` must not be below `minimum`, unless it is null."""

    def is_below(run: Any) -> bool:
        value = number(section, key)(run)
        return value is not None and value < minimum

    return Rule((key,), f"must be at least {minimum}", "", is_below)


def within(section: str, key: str, low: float, high: float, *, or_high: bool) -> Rule:
    """The number `key` must be from `low` up to `high`; `or_high` says whether `high` itself is allowed."""

    def is_outside(run: Any) -> bool:
        value = number(section, key)(run)
        return value is not None and not (low <= value < high or (or_high and value == high))

    return Rule((key,), f"must be from {low} {'to' if or_high else 'to below'} {high}", "", is_outside)


def above(
    section: str, key: str, minimum: float, *, if_training: tuple[str, str] | None = None, remedy: str = ""
) -> Rule:
    """The number `key` must be above `minimum`, unless it is null; with `if_training` = (key, value), only then."""

    def is_too_small(run: Any) -> bool:
        value = number(section, key)(run)
        matters = if_training is None or run.training[if_training[0]] == if_training[1]
        return matters and value is not None and value <= minimum

    return Rule((key, *(if_training or ())[:1]), f"must be above {minimum}", remedy, is_too_small)


def number(section: str, key: str) -> Callable[[Any], Any]:
    if section == "training":
        return lambda run: run.training[key]
    return attrgetter(f"{section}.{key}")
