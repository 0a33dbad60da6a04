"""What LLaMA Board saves (`llamaboard_config/*.yaml`) as the text of a run file, by the table `llamaboard.toml`.

train.learning_rate: '5e-5'   ->   learning_rate: 5e-5
"""

import json
import math
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from luthier.config.key_table import catalog
from luthier.core.errors import InvalidInput
from luthier.webui.document import as_yaml, values_of
from luthier.webui.form import groups

_SAYS_NOTHING: tuple[Any, ...] = (None, "", [], "none")
_STAGES_OF_ZERO = ("2", "3")


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def is_config(value: Any) -> bool:
    return isinstance(value, dict) and any(str(name).startswith(("top.", "train.")) for name in value)


def run_text(elements: Mapping[str, Any]) -> str:
    """`elements`: element of the board -> its value. Keys that the run would not read are left out.

    Raises `InvalidInput` for further keys (`train.extra_args`) that are no JSON object.
    """
    written = {"do_train": "true", **_chosen(elements)}
    written |= _deepspeed(elements) | _evaluation(written)
    further = _further(elements)
    written |= further
    values = values_of(_as_text(written))
    read = {field.name for group in groups("train", values) for field in group.fields} | further.keys()
    kept = _as_text({key: value for key, value in written.items() if key in read})
    if "model_name_or_path" in values:
        return kept
    # LLaMA Board saves the name that its list has for the model, and not where the model is.
    return f"model_name_or_path:  # {elements.get('top.model_name', '')}\n{kept}".replace("#  \n", "\n")


def _as_text(written: Mapping[str, str]) -> str:
    return "".join(f"{key}: {value}\n" for key, value in written.items())


def _chosen(elements: Mapping[str, Any]) -> dict[str, str]:
    """Key -> its value in YAML, for all elements that ask for something."""
    known, written = _table(), dict[str, str]()
    for element, setting in elements.items():
        if lines := known["lines"].get(element, {}).get(setting if isinstance(setting, str) else None):
            written |= dict(line.split(": ", 1) for line in lines.splitlines())
        elif (key := known["pixels"].get(element)) and isinstance(setting, str):
            if (pixels := _product(setting)) not in (None, catalog()[key][0].default):
                written[key] = str(pixels)
        elif (key := known["keys"].get(element)) and _asks(key, setting):
            written[key] = _written(setting)
    return written


def _asks(key: str, setting: Any) -> bool:
    if isinstance(setting, bool):
        return setting != bool(catalog()[key][0].default)
    return setting not in _SAYS_NOTHING and setting != 0


def _product(text: str) -> int | None:
    """`768*768` -> the number of pixels; None for what is no product of numbers."""
    parts = [part.strip() for part in text.split("*")]
    return math.prod(map(int, parts)) if all(part.isdecimal() for part in parts) else None


def _deepspeed(elements: Mapping[str, Any]) -> dict[str, str]:
    """LLaMA Board writes these files itself when it starts."""
    stage = str(elements.get("train.ds_stage"))
    if stage not in _STAGES_OF_ZERO:
        return {}
    offload = "offload_" if elements.get("train.ds_offload") else ""
    return {"deepspeed": f"llamaboard_cache/ds_z{stage}_{offload}config.json"}


def _evaluation(written: Mapping[str, str]) -> dict[str, str]:
    """LLaMA Board evaluates a run with `val_size` whenever it saves."""
    if "val_size" not in written:
        return {}
    same = {"eval_steps": "save_steps", "per_device_eval_batch_size": "per_device_train_batch_size"}
    return {"eval_strategy": "steps"} | {key: written[name] for key, name in same.items() if name in written}


def _further(elements: Mapping[str, Any]) -> dict[str, str]:
    text = elements.get("train.extra_args") or "{}"
    try:
        found = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError) as fault:
        raise InvalidInput(f"train.extra_args: is not valid JSON: {fault}") from None
    if not isinstance(found, dict):
        raise InvalidInput("train.extra_args: is not a JSON object")
    return {
        str(key): as_yaml(value, is_text=True) if isinstance(value, str) else json.dumps(value)
        for key, value in found.items()
    }


def _written(setting: Any) -> str:
    if isinstance(setting, bool):
        return str(setting).lower()
    if isinstance(setting, list):
        return as_yaml(",".join(map(str, setting)), is_text=True)
    return as_yaml(str(setting), is_text=isinstance(setting, str) and not _is_number(setting))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
