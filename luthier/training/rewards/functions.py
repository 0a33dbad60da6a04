"""`reward_funcs`: the user's Python functions that score answers."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.core.errors import InvalidInput, RunFailed
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
        with ThreadPoolExecutor(max_workers=1) as thread:  # captures any exception of the function
            result = thread.submit(lambda: self.function(**taken))
            fault = result.exception()
        if fault is not None:
            raise RunFailed(
                f"reward_funcs: {self.name}: it raised {type(fault).__name__}: {fault}"
                f" -> call it with completions={offered['completions'][:1]!r} to see why"
            ) from fault
        return checked(f"reward_funcs: {self.name}", result.result(), answers)


def load_function(name: str) -> FunctionReward:
    """`file.py:function` or `module:function`. Raises `InvalidInput`."""
    source, _, function_name = name.rpartition(":")
    path = Path(source).expanduser()
    key = f"reward_funcs: {name}"
    if path.suffix == ".py":
        if not path.is_file():
            raise InvalidInput(f"{key}: there is no file {path} -> correct the path (relative to {Path.cwd()})")
        spec = importlib.util.spec_from_file_location(f"luthier_reward_{path.stem}", path)
        assert spec is not None and spec.loader is not None, "a .py file has a loader"
        module = importlib.util.module_from_spec(spec)
        loader: Any = spec.loader
        load: Callable[[], Any] = lambda: loader.exec_module(module)  # noqa: E731
    else:
        load = lambda: importlib.import_module(source)  # noqa: E731
    with ThreadPoolExecutor(max_workers=1) as thread:
        result = thread.submit(load)
        fault = result.exception()
    if fault is not None:
        raise InvalidInput(f"{key}: {source} cannot be imported ({type(fault).__name__}: {fault})") from fault
    found = vars(module if path.suffix == ".py" else result.result()).get(function_name)
    if not callable(found):
        raise InvalidInput(f"{key}: {source} has no function {function_name} -> correct the name")
    return FunctionReward(name, found)
