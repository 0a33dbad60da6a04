"""What a training run names beside its model: a reference, a teacher, a reward model, reward functions.

They are loaded after the model, so whether they exist is checked first: without importing torch, and without running
the user's code.
"""

import ast
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from luthier.config.runs import TrainRun
from luthier.core.errors import ModelError, Problem
from luthier.model.adapters._series import adapters_of_reward_model, given_as
from luthier.model.classes import adapter_gives_scores, names_scorer
from luthier.model.files.sources import ModelSource, check_adapter_source, check_source, is_hub_id
from luthier.workflow.preflight.requirements import series_problems


def frozen_model_problems(run: TrainRun) -> Iterator[Problem]:
    """Problems with the folders and files that the keys of the stage name. Names on a hub are not checked.

    A key that names a model has a second key for its adapters, e.g. `ref_model` and `ref_model_adapters`; a reward
    model has a third one for its type.
    """
    keys = asdict(run.method)
    for key, name in keys.items():
        if f"{key}_adapters" not in keys or name is None:
            continue
        adapters, kind = keys[f"{key}_adapters"], keys.get(f"{key}_type")
        faults: list[Problem] = []
        if kind != "api" and not is_hub_id(name):
            faults += _model_problems(key, name, kind, run.model.adapter_folder, has_adapters=bool(adapters))
        for adapter in adapters:
            if not is_hub_id(adapter):
                check = partial(check_adapter_source, folder=run.model.adapter_folder)
                faults += _as_problems(f"{key}_adapters", adapter, check)
        yield from faults or _series_problems(run, key, name, kind, adapters)
    for name in keys.get("reward_funcs", ()):
        source, colon, function = name.rpartition(":")
        if colon and (reason := _reason_against(source, function)):
            yield Problem("reward_funcs", *reason, value=name, has_value=True)


def _series_problems(
    run: TrainRun, key: str, name: str, kind: str | None, adapters: Sequence[str]
) -> Iterator[Problem]:
    """Adapters that are put on something else than they were trained on. `kind`: as for `_model_problems`."""
    base, folder = run.model.model_name_or_path, run.model.adapter_folder
    if kind == "lora":
        yield from series_problems(key, (name,), ModelSource(base), folder, adapters_of_reward_model(base))
    elif kind != "api":
        adapters_key = f"{key}_adapters"
        yield from series_problems(adapters_key, adapters, ModelSource(name), folder, given_as(adapters_key))


def _model_problems(
    key: str, name: str, kind: str | None, adapter_folder: str | None, *, has_adapters: bool
) -> Iterator[Problem]:
    """`kind`: `full` or `lora` for a reward model, None for a language model. `adapter_folder`: inside an adapter."""
    folder = Path(name, adapter_folder or "" if kind == "lora" else "").expanduser()
    is_model, is_adapter = ((folder / file).is_file() for file in ("config.json", "adapter_config.json"))
    if kind == "lora" and is_model and not is_adapter:
        yield Problem(key, "this is a model, not an adapter", f"set {key}_type: full", value=name, has_value=True)
    elif kind != "lora" and is_adapter and not is_model:
        remedy = f"name its base model here, and the adapter as {key}_adapters"
        yield Problem(key, "this is an adapter, not a model", remedy, value=name, has_value=True)
    else:
        check = partial(check_adapter_source, folder=adapter_folder) if kind == "lora" else _check_model
        faults = [*_as_problems(key, name, check)]
        yield from faults or (_scoreless(key, name, folder, kind) if kind and not has_adapters else ())


def _check_model(name: str) -> None:
    check_source(ModelSource(name))


def _scoreless(key: str, name: str, folder: Path, kind: str) -> Iterator[Problem]:
    """A model or an adapter on this machine, in `folder`, that has no reward head."""
    if kind == "lora":
        writes = not adapter_gives_scores(folder)
    else:
        config = folder / "config.json"
        writes = config.is_file() and not names_scorer(json.loads(config.read_text("utf-8")).get("architectures"))
    if writes:
        what = "adapter" if kind == "lora" else "model"
        reason = f"this {what} has no reward head, so it cannot score answers"
        yield Problem(key, reason, "name one that was trained with stage: rm", value=name, has_value=True)


def _as_problems(key: str, name: str, check: Callable[[str], None]) -> Iterator[Problem]:
    """The problem that `check` raises about `name`, if any."""
    try:
        check(name)
    except ModelError as error:
        reason, _, remedy = str(error).removeprefix(f"{name}: ").partition(" -> ")
        yield Problem(key, reason, remedy or "correct the path", value=name, has_value=True)


def _reason_against(source: str, function: str) -> tuple[str, str] | None:
    """Reason and remedy if the file `source` cannot hold a function of this name. Modules are not checked."""
    path = Path(source).expanduser()
    if path.suffix != ".py":
        return None
    if not path.is_file():
        return f"there is no file {path}", f"correct the path (relative to {Path.cwd()})"
    try:
        module = ast.parse(path.read_bytes(), str(path))
    except SyntaxError as fault:
        return f"{path}, line {fault.lineno}, is not Python: {fault.msg}", "correct the file"
    except (ValueError, RecursionError) as fault:  # zero bytes, or thousands of brackets
        return f"{path} is not Python: {fault}", "correct the file"
    names = _bound_names(module)
    if function in names or "*" in names:
        return None
    known = ", ".join(node.name for node in module.body if isinstance(node, ast.FunctionDef))
    return f"{path} has no function {function}", f"correct the name; it has {known or 'none'}"


def _bound_names(module: ast.Module) -> set[str]:
    """The names that a module defines or imports; `*` for a star import."""
    names: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names
