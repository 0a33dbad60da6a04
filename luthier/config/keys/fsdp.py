"""The settings of FSDP: from the names of transformers 4 and accelerate to those that transformers 5 takes.

transformers 5 has `fsdp: true` and a mapping `fsdp_config`. Run files also say

    fsdp: full_shard auto_wrap              # or a list of these words
    fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
    fsdp_config: {fsdp_offload_params: true, fsdp_sharding_strategy: FULL_SHARD}

transformers 5 would pass over names in `fsdp_config` that it does not know, without a word.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from luthier.config.keys.training import TrainingKeys
from luthier.core.errors import Problem
from luthier.core.registry import did_you_mean

STRATEGIES = ("full_shard", "shard_grad_op", "no_shard", "hybrid_shard", "hybrid_shard_zero2")
"""In the order of their numbers in accelerate, which begin with 1."""
WORDS = (*STRATEGIES, "offload", "auto_wrap")
_RESHARDS = {"full_shard": True, "shard_grad_op": False}
"""Strategy that FSDP 2 has -> whether weights are sharded again after the forward pass."""
_FORMER_NAMES = {
    "offload_params": "cpu_offload",
    "sharding_strategy": "reshard_after_forward",
    "transformer_cls_names_to_wrap": "transformer_layer_cls_to_wrap",
}
_OF_VERSION_1 = ("backward_prefetch", "forward_prefetch", "limit_all_gathers", "sync_module_states", "use_orig_params")
_NAMES = (
    *("version", "reshard_after_forward", "cpu_offload", "activation_checkpointing", "cpu_ram_efficient_loading"),
    *("state_dict_type", "auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params"),
    *("xla", "xla_fsdp_v2", "xla_fsdp_settings", "xla_fsdp_grad_ckpt", *_OF_VERSION_1),
)
"""What transformers 5 reads in `fsdp_config`."""
LAYERS, SMALLEST = "fsdp_transformer_layer_cls_to_wrap", "fsdp_min_num_params"
"""Keys of the run file that are settings of `fsdp_config` in transformers 5."""


@dataclass(slots=True)
class FsdpSettings:
    """`values` is the `fsdp_config` of transformers 5."""

    values: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)

    def blame(self, key: str, reason: str, remedy: str) -> None:
        self.problems.append(Problem(key, reason, remedy))

    def put(self, key: str, name: str, value: Any) -> None:
        if name in self.values and self.values[name] != value:
            reason = f"says {name}: {value}, and another setting of FSDP says {name}: {self.values[name]}"
            self.blame(key, reason, "leave one of the two out")
        self.values[name] = value


def fsdp_settings(keys: TrainingKeys, config: Mapping[str, Any]) -> FsdpSettings:
    """`config` is `fsdp_config`, read if it is a file. For runs that set `fsdp`."""
    found = FsdpSettings()
    plain = {name.removeprefix("fsdp_"): value for name, value in config.items()}
    version = str(plain.get("version", 2))
    if version not in ("1", "2"):
        found.blame("fsdp_config", f"there is no version {version} of FSDP", "set version: 2, or leave it out")
    for written, value in config.items():
        _read_setting(found, written, value, is_first=version == "1")
    for word in words_of(keys["fsdp"]):
        _read_word(found, word, is_first=version == "1")
    if keys[LAYERS]:
        found.put(LAYERS, "transformer_layer_cls_to_wrap", _names(keys[LAYERS]))
    if keys[SMALLEST]:
        found.put(SMALLEST, "min_num_params", keys[SMALLEST])
    if found.values.get("min_num_params") and "transformer_layer_cls_to_wrap" in found.values:
        reason = "shards by the size of modules, and transformer_layer_cls_to_wrap by their class"
        found.blame(SMALLEST if keys[SMALLEST] else "fsdp_config", reason, "leave one of the two out")
    elif found.values.get("min_num_params"):
        found.values.setdefault("auto_wrap_policy", "SIZE_BASED_WRAP")
    return found


def words_of(fsdp: Any) -> list[str]:
    """The words of `fsdp`: a text with spaces, or a list."""
    parts = [fsdp] if isinstance(fsdp, str) else fsdp if isinstance(fsdp, (list, tuple)) else ()
    return [word.lower() for part in parts for word in part.split()]


def _read_setting(found: FsdpSettings, written: str, value: Any, *, is_first: bool) -> None:
    plain = written.removeprefix("fsdp_")
    name = _FORMER_NAMES.get(plain, plain)
    if name not in _NAMES:
        remedy = did_you_mean(plain, (*_NAMES, *_FORMER_NAMES)) or f"one of {', '.join(_NAMES)}"
        found.blame("fsdp_config", f"{written} is not a setting of FSDP", remedy)
    elif name in _OF_VERSION_1 and not is_first:
        reason = f"{written} has no effect: it is a setting of FSDP 1, and FSDP 2 decides it by itself"
        found.warnings.append(Problem("fsdp_config", reason, "leave it out"))
    elif name == "reshard_after_forward":
        _put_strategy(found, "fsdp_config", str(value).lower(), is_first=is_first)
    elif name == "transformer_layer_cls_to_wrap":
        found.put("fsdp_config", name, _names(value))
    elif name == "auto_wrap_policy" and isinstance(value, str):
        found.put("fsdp_config", name, value.upper())
    else:
        found.put("fsdp_config", name, value)


def _read_word(found: FsdpSettings, word: str, *, is_first: bool) -> None:
    if word in STRATEGIES:
        _put_strategy(found, "fsdp", word, is_first=is_first)
    elif word == "offload":
        found.put("fsdp", "cpu_offload", True)
    elif word != "auto_wrap":
        found.blame("fsdp", f"{word} is not a word of FSDP", did_you_mean(word, WORDS) or f"use {', '.join(WORDS)}")


def _put_strategy(found: FsdpSettings, key: str, strategy: str, *, is_first: bool) -> None:
    """`strategy` is its name, its number or, for FSDP 2, whether to shard again: `full_shard`, `1`, `true`."""
    if strategy in map(str, range(1, len(STRATEGIES) + 1)):
        strategy = STRATEGIES[int(strategy) - 1]
    if is_first and strategy in STRATEGIES:
        found.put(key, "reshard_after_forward", strategy)
    elif strategy in ("true", "false"):
        again = strategy == "true"
        found.put(key, "reshard_after_forward", STRATEGIES[not again] if is_first else again)
    elif strategy in _RESHARDS:
        found.put(key, "reshard_after_forward", _RESHARDS[strategy])
    elif strategy == "no_shard":
        found.blame(
            key, "no_shard shards nothing, and FSDP 2 does not have it", "leave fsdp out: torchrun copies weights"
        )
    elif strategy in STRATEGIES:
        found.blame(key, f"{strategy} is not part of FSDP 2", "use full_shard or shard_grad_op")
    else:
        found.blame(
            key, f"{strategy} is not a sharding strategy", did_you_mean(strategy, STRATEGIES) or "use full_shard"
        )


def _names(value: Any) -> list[str]:
    """Class names, from a list or a text with commas."""
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else list(value)
