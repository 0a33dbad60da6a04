"""A section: a config class, and the condition under which its keys are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RUN_COMMANDS = ("train", "infer", "export", "eval")
"""The kinds of run file. `infer` stands for every command that generates text."""
COMMAND_WORDS = {"train": "luthier train", "infer": "luthier chat", "export": "luthier export", "eval": "luthier eval"}
TRUE_WORDS = ("true", "y", "1")


def is_on(environment: Mapping[str, str], name: str) -> bool:
    """Whether an environment variable of the reference is switched on."""
    return environment.get(name, "").lower() in TRUE_WORDS


@dataclass(frozen=True, slots=True)
class Section:
    """The owner of some keys. Without `key` and `environment`, every run of these commands reads them."""

    name: str
    config: type
    commands: tuple[str, ...] = RUN_COMMANDS
    key: str = ""
    """Read only if this key has one of `values`; the key itself is always read."""
    values: tuple[Any, ...] = ()
    """Empty: any value that switches something on, i.e. neither false nor null."""
    environment: str = ""
    """Read only if this environment variable is on."""
    example: str = "true"
    """How `key` is written to switch something on, where `values` are empty."""

    def reads(self, command: str, values: Mapping[str, Any], environment: Mapping[str, str]) -> bool:
        """Whether a run of `command` with these values (defaults included) reads the keys of this section."""
        if command not in self.commands:
            return False
        if self.environment and not is_on(environment, self.environment):
            return False
        if not self.key:
            return True
        return values[self.key] in self.values if self.values else values[self.key] not in (False, None)

    def reader(self, command: str = "") -> str:
        """Who reads these keys, in words. `command`: the command of the reader, if there is one."""
        condition = f"{self.environment}=1" if self.environment else ""
        if self.key:
            condition = f"{self.key}: {' or '.join(map(str, self.values)) or self.example}"
        commands = " and ".join(f"`{COMMAND_WORDS[name]}`" for name in self.commands)
        if self.commands == RUN_COMMANDS or command in self.commands:
            return condition or "every run"
        return f"{commands} with {condition}" if condition else commands
