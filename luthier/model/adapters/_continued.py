"""An adapter that is trained further keeps its settings: what a run file says otherwise is a warning with both values.

lora_rank: 16                   the adapter has r: 8
lora_target: q_proj,v_proj      the adapter is on k_proj as well
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError, Problem
from luthier.core.kinds import ADAPTERS
from luthier.core.log import warn
from luthier.model.files.sources import read_json

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun

COUNTERPARTS = {
    "lora_rank": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target": "target_modules",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "oft_rank": "r",
    "oft_block_size": "oft_block_size",
    "oft_target": "target_modules",
    "module_dropout": "module_dropout",
    "additional_target": "modules_to_save",
}
"""Key of a run file -> what peft calls it in adapter_config.json."""
REMEDY = "leave it out, or set create_new_adapter: true, which merges that adapter and starts a new one"
_ALL = "all"


def local_problems(run: "TrainRun") -> Iterator[Problem]:
    """What a run says of an adapter on this machine that it trains further, where the adapter says otherwise.

    Whether `all` names the same layers is known only beside the model: see `warn_of_targets`.
    """
    names = run.model.adapter_name_or_path
    if not (run.trains and names and ADAPTERS.get(run.finetuning_type).adds_weights) or run.adapter.create_new_adapter:
        return
    file = Path(names[-1], run.model.adapter_folder or "", "adapter_config.json").expanduser()
    try:
        config = read_json(file) if file.is_file() else {}
    except ModelError:  # reported where the adapter is checked
        return
    if "peft_type" in config:
        yield from differences(written_for(run), config, names[-1])


def written_for(run: "TrainRun") -> dict[str, Any]:
    """What the run file says of the adapter. Keys of other methods have their own warning."""
    own = {"finetuning_type", *(key.name for key in fields(run.adapter))}
    return {key: value for key, value in run.given.items() if key in own}


def differences(written: Mapping[str, Any], config: Mapping[str, Any], name: str) -> Iterator[Problem]:
    """`written`: see `written_for`. `config`: of the adapter `name`, as in its adapter_config.json."""
    method = str(config.get("peft_type", ""))
    asked = written.get("finetuning_type", method)
    if asked.lower() != method.lower():
        yield _problem("finetuning_type", asked, f"adapter {name} is of {method} and is trained further as such")
    for key, own in COUNTERPARTS.items():
        value = written.get(key)
        if value is None or (_is_target(key) and _ALL in value):
            continue
        if own not in config:
            yield _problem(key, value, f"adapter {name} is of {method}, which has no such setting")
        elif _comparable(value) != _comparable(config[own]):
            yield _problem(key, value, f"adapter {name} was made with {own}: {_words(config[own])}, and keeps it")


def _is_target(key: str) -> bool:
    return COUNTERPARTS[key] == "target_modules"


def _comparable(value: Any) -> Any:
    """Lists in any order; one that is not there is empty."""
    if value is None:
        return frozenset()
    return frozenset(map(str, value)) if isinstance(value, list | tuple | set) else value


def _words(value: Any) -> str:
    if isinstance(value, list | tuple | set):
        return ",".join(sorted(map(str, value)))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _problem(key: str, value: Any, reason: str) -> Problem:
    shown = _words(value) if isinstance(value, list | tuple) else value
    return Problem(key, f"is not read, since {reason}", REMEDY, value=shown, has_value=True)


def warn_of_targets(written: Mapping[str, Any], linear: Sequence[str], adapted: Sequence[str], name: str) -> None:
    """For `all`: `linear` are the layers that it names, and `adapted` those that the adapter is on, by full names.

    `written`: see `written_for`.
    """
    for key in ("lora_target", "oft_target"):
        if _ALL in written.get(key, ()) and set(linear) != set(adapted):
            endings = sorted({layer.rpartition(".")[2] for layer in adapted})
            warn(str(_problem(key, _ALL, f"adapter {name} is on other layers ({_words(endings)}), and stays there")))
