"""What a rule is, and helpers that make the common kinds of rules.

    quantized = When(is_given("quantization", "quantization_bit"))
    Rules((
        at_least("training", "max_grad_norm", 0),
        quantized.refuses(("resize_vocab",), "needs full-precision embeddings", "leave it out",
                          is_set("model", "resize_vocab")),
    ))

`Rules` is also the type of the `check` of a stage, an adapter, an optimizer and a quantizer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from luthier.config.sections import RUN_COMMANDS
from luthier.core.errors import Problem

Condition = Callable[[Any], bool]
"""(run) -> whether it holds."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that a run must not be. A message names the first of `keys`."""

    keys: tuple[str, ...]
    """All keys that the rule reads. It is skipped while the value of one of them is unknown."""
    reason: str
    remedy: str
    broken: Condition
    """Whether this run breaks the rule."""
    only_warns: bool = False
    commands: tuple[str, ...] = RUN_COMMANDS
    """The commands that the rule is for, of those that read the group it stands in."""
    for_rows: bool = True
    """Whether it also applies to `luthier data`, which shows rows and neither trains nor writes."""
    is_local: bool = False
    """Whether it is about what is installed here. A run that starts on another machine may break it."""
    file: str = ""
    """Where the first key stands, if it is not a key of the run file, e.g. `environment`."""

    def problem(self) -> Problem:
        return Problem(self.keys[0], self.reason, self.remedy, file=self.file)


class Rules(tuple[Rule, ...]):
    """Rules that apply together."""

    __slots__ = ()


NO_RULES = Rules(())


def in_training(*rules: Rule) -> tuple[Rule, ...]:
    """The same rules, for training runs only."""
    return tuple(replace(rule, commands=("train",)) for rule in rules)


def warning(keys: tuple[str, ...], reason: str, remedy: str, broken: Condition) -> Rule:
    """A rule that warns and stops nothing."""
    return Rule(keys, reason, remedy, broken, only_warns=True)


def missing_library(key: str, library: str, remedy: str, broken: Condition) -> Rule:
    """A rule about a library that a run needs. `broken`: whether this run needs it and it is not installed."""
    return Rule((key,), f"needs the library {library}, which is not installed", remedy, broken, is_local=True)


@dataclass(frozen=True, slots=True)
class When:
    """Makes rules that apply only where a condition holds."""

    condition: Condition

    def refuses(self, keys: tuple[str, ...], reason: str, remedy: str, broken: Condition) -> Rule:
        return Rule(keys, reason, remedy, all_of(self.condition, broken))

    def warns(self, keys: tuple[str, ...], reason: str, remedy: str, broken: Condition) -> Rule:
        return warning(keys, reason, remedy, all_of(self.condition, broken))


def value_of(section: str, key: str) -> Callable[[Any], Any]:
    """(run) -> the value of `key`. A section is an attribute of the run, or e.g. `optimizers.galore`."""
    if section == "training":
        return lambda run: run.training[key]
    if section.startswith("optimizers."):
        name = section.removeprefix("optimizers.")
        return lambda run: getattr(run.optimizers[name], key)
    return attrgetter(f"{section}.{key}")


def is_set(section: str, key: str) -> Condition:
    """The value is neither false, zero, empty nor null."""
    value = value_of(section, key)
    return lambda run: bool(value(run))


def is_given(section: str, key: str) -> Condition:
    """The value is not null."""
    value = value_of(section, key)
    return lambda run: value(run) is not None


def is_other_than(section: str, key: str, expected: Any) -> Condition:
    value = value_of(section, key)
    return lambda run: value(run) != expected


def is_changed(key: str) -> Condition:
    """The user wrote the key, with another value than the default."""
    return lambda run: key in run.changed


def is_turned_on(key: str) -> Condition:
    """The user wrote the key, whatever section it belongs to, and turned something on."""
    return lambda run: bool(run.given.get(key))


def all_of(*conditions: Condition) -> Condition:
    return lambda run: all(condition(run) for condition in conditions)


def not_(condition: Condition) -> Condition:
    return lambda run: not condition(run)


def at_least(section: str, key: str, minimum: float, remedy: str = "") -> Rule:
    """The number `key` must not be below `minimum`, unless it is null."""
    value = value_of(section, key)

    def is_below(run: Any) -> bool:
        number = value(run)
        return number is not None and number < minimum

    return Rule((key,), f"must be at least {minimum}", remedy, is_below)


def at_most(section: str, key: str, maximum: float) -> Rule:
    """The number `key` must not be above `maximum`, unless it is null."""
    value = value_of(section, key)

    def is_above(run: Any) -> bool:
        number = value(run)
        return number is not None and number > maximum

    return Rule((key,), f"must be at most {maximum}", "", is_above)


def merged_once(section: str, key: str) -> Rule:
    """No adapter of the series `key` may be named twice."""
    value = value_of(section, key)
    return Rule(
        (key,),
        "names an adapter twice, and it would be merged twice",
        "name each adapter once",
        lambda run: len(set(value(run))) < len(value(run)),
    )


def within(section: str, key: str, low: float, high: float, *, or_high: bool) -> Rule:
    """The number `key` must be from `low` up to `high`; `or_high` says whether `high` itself is allowed."""
    value = value_of(section, key)

    def is_outside(run: Any) -> bool:
        number = value(run)
        return number is not None and not (low <= number < high or (or_high and number == high))

    return Rule((key,), f"must be from {low} {'to' if or_high else 'to below'} {high}", "", is_outside)


def above(
    section: str, key: str, minimum: float, *, if_training: tuple[str, str] | None = None, remedy: str = ""
) -> Rule:
    """The number `key` must be above `minimum`, unless it is null; with `if_training` = (key, value), only then."""
    value = value_of(section, key)

    def is_too_small(run: Any) -> bool:
        number = value(run)
        matters = if_training is None or run.training[if_training[0]] == if_training[1]
        return matters and number is not None and number <= minimum

    return Rule((key, *(if_training or ())[:1]), f"must be above {minimum}", remedy, is_too_small)
