"""`reward_funcs`: the user's Python functions that score answers."""

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from luthier.core.errors import InvalidInput, RunFailed
from luthier.core.threads import Outcome, outcome_of
from luthier.data.media.kinds import by_column, media_kinds
from luthier.training.rewards import Answered, checked


@dataclass(frozen=True, slots=True)
class FunctionReward:
    """Called with those of `prompts`, `completions`, `answers`, `images`, `videos` and `audios` that it has parameters
    for.

    The last three: a list of paths for each answer.
    """

    name: str
    function: Callable[..., Any]

    def __call__(self, answers: Sequence[Answered]) -> list[float]:
        offered: dict[str, list[Any]] = {
            "prompts": [answered.prompt for answered in answers],
            "completions": [answered.answer for answered in answers],
            "answers": [answered.given for answered in answers],
        }
        parameters = inspect.signature(self.function).parameters
        media = [by_column(answered.media) for answered in answers]
        for column in (kind.column for kind in media_kinds()):
            if column in parameters or any(column in own for own in media):
                offered[column] = [own.get(column, []) for own in media]
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        taken = {name: texts for name, texts in offered.items() if takes_all or name in parameters}
        result = called(lambda: self.function(**taken))
        fault = result.fault
        if fault is not None:
            raise RunFailed(
                f"reward_funcs: {self.name}: it raised {type(fault).__name__}: {fault}"
                f" -> call it with completions={offered['completions'][:1]!r} to see why"
            ) from fault
        return checked(f"reward_funcs: {self.name}", result.value, answers)


def called(work: Callable[[], Any]) -> Outcome[Any]:
    """The result of the user's code, or whatever it raises. It runs in a thread, so that it catches no signal of ours,
    and on the accelerator of this process, which a new thread does not have by itself. A signal that ends the run does
    not wait for it."""
    device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None

    def on_device() -> Any:
        if device is not None:
            torch.accelerator.set_device_index(device)
        return work()

    return outcome_of(on_device)


def _module_of(path: Path) -> ModuleType:
    """Two files may have the same name, and decorators such as `dataclass` look a module up by its own."""
    name = f"luthier_reward_{path.stem}_{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with ExitStack() as at_failure:
        at_failure.callback(sys.modules.pop, name, None)
        spec.loader.exec_module(module)
        at_failure.pop_all()
    return module


def load_function(name: str) -> FunctionReward:
    """`file.py:function` or `module:function`. Raises `InvalidInput`."""
    source, _, function_name = name.rpartition(":")
    path = Path(source).expanduser()
    key = f"reward_funcs: {name}"
    if path.suffix == ".py":
        if not path.is_file():
            raise InvalidInput(f"{key}: there is no file {path} -> correct the path (relative to {Path.cwd()})")
        result = called(partial(_module_of, path))
    else:
        result = called(partial(importlib.import_module, source))
    fault = result.fault
    if fault is not None:
        raise InvalidInput(f"{key}: {source} cannot be imported ({type(fault).__name__}: {fault})") from fault
    found = vars(result.value).get(function_name)
    if not callable(found):
        raise InvalidInput(f"{key}: {source} has no function {function_name} -> correct the name")
    _require_known_parameters(key, found)
    return FunctionReward(name, found)


def _require_known_parameters(key: str, function: Callable[..., Any]) -> None:
    """Raises `InvalidInput` for a parameter that nothing is given for, before answers are sampled."""
    given = ("prompts", "completions", "answers", *(kind.column for kind in media_kinds()))
    for parameter in inspect.signature(function).parameters.values():
        is_optional = parameter.default is not parameter.empty
        if is_optional or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY or parameter.name not in given:
            raise InvalidInput(
                f"{key}: nothing is given for its parameter {parameter.name}"
                f" -> a reward function chooses by name among {', '.join(given)}"
            )
