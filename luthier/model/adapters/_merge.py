"""Existing adapters: attached to a model, checked against it, and merged into its weights."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError
from luthier.core.log import info, warn
from luthier.model.adapters._continued import differences, warn_of_targets
from luthier.model.adapters._loftq import require_base
from luthier.model.adapters._new_rows import with_new_rows
from luthier.model.adapters._series import AS_ADAPTERS, Series, beneath, check_series, merged_into
from luthier.model.adapters._targets import find_targets
from luthier.model.adapters._ties import settle_ties, untie_adapted
from luthier.model.classes import SCORE_TASK, adapter_gives_scores, gives_scores
from luthier.model.compat.oft_dimensions import rotate_any_dimensions
from luthier.model.embeddings import NewTokens, embedding_names, grow_embeddings, num_rows
from luthier.model.files.hubs import NO_ACCESS, HubAccess, hub_access
from luthier.model.files.readable import UNREADABLE, first_line
from luthier.model.files.sources import ModelSource, check_adapter_source, is_hub_id, local_path
from luthier.model.modules import linear_layers, unwrap
from luthier.model.quantization._layers import forget_description, is_quantized

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from luthier.config.keys.model import ModelConfig


@dataclass(frozen=True, slots=True)
class GivenAdapters:
    """`adapter_name_or_path` and where to look for it."""

    names: Sequence[str] = ()
    folder: str | None = None
    """Sub-folder of each that holds the adapter (`adapter_folder`)."""
    access: HubAccess = NO_ACCESS
    written: Mapping[str, Any] = field(default_factory=dict)
    """What the run file says of an adapter (`_continued.written_for`), for one that is trained further."""

    def __bool__(self) -> bool:
        return bool(self.names)


def merge_adapters(
    model: "PreTrainedModel",
    names: Sequence[str],
    given: GivenAdapters,
    before_merge: "Callable[[PeftModel], None] | None" = None,
) -> "PreTrainedModel":
    """W <- W + B A for each adapter in turn, on top of those before. Raises `ModelError` for one that does not fit.

    `before_merge` is shown the model with each adapter beside it, before that one is merged."""
    if names and is_quantized(model):
        raise ModelError(
            f"adapter_name_or_path: {', '.join(names)}: cannot be merged into quantized weights"
            " -> merge into the original model with `luthier export`, and give its folder as model_name_or_path"
        )
    for name in names:
        adapted = attach_adapter(model, name, given, is_trainable=False)
        if before_merge is not None:
            before_merge(adapted)
        untie_adapted(adapted)
        with _possible(name, adapted.peft_config["default"], "merged"):
            model = adapted.merge_and_unload()
        settle_ties(model)
        forget_description(model)
        info(f"adapter {name} merged into the model")
    return model


def attach_unmerged(model: "PreTrainedModel", given: GivenAdapters) -> "PreTrainedModel":
    """The model with its last adapter in place, not merged, and those before it merged.

    Raises `ModelError` for several adapters on a quantized model.
    """
    if len(given.names) > 1 and is_quantized(model):
        raise ModelError(
            "adapter_name_or_path: several adapters cannot be put on a quantized model, since all but one would have to"
            " be merged into it -> merge them into the original model with `luthier export`, and give its folder"
        )
    model = merge_adapters(model, given.names[:-1], given)
    for name in given.names[-1:]:
        model = unwrap(attach_adapter(model, name, given, is_trainable=False))
        info(f"adapter {name} attached to the {'quantized ' if is_quantized(model) else ''}weights")
    return model


def attach_adapter(
    model: "PreTrainedModel", name: str, given: GivenAdapters, *, is_trainable: bool, pure_bf16: bool = False
) -> "PeftModel":
    """The model with the adapter on top. Raises `ModelError` if it is missing, damaged or made for another model."""
    import torch
    from peft import PeftConfig, PeftModel

    path = adapter_path(name, given)
    shapes = _shapes(path)
    if any(weight.is_meta for weight in model.parameters()):
        raise ModelError(
            f"adapter_name_or_path: {name}: a part of the model did not fit into memory and is on disk, where nothing"
            " can be added to it -> merge the adapter with `luthier export` where there is more memory"
        )
    try:
        config = PeftConfig.from_pretrained(str(path))
    except UNREADABLE as fault:  # an unknown `peft_type`, or keys that it does not have
        raise _unreadable(path, fault) from fault
    _require_mergeable(name, config)
    if config.peft_type == "OFT":
        rotate_any_dimensions()
    if gives_scores(model.config) and config.task_type != SCORE_TASK:
        config.task_type = None  # peft would make it write, and the model does not
    base, used = str(config.base_model_name_or_path or ""), model.config._name_or_path
    try:
        _make_room(model, shapes, config)
        with warnings.catch_warnings():
            # `_check_names` turns what peft only warns of into an error.
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            adapted = PeftModel.from_pretrained(
                model, str(path), is_trainable=is_trainable, config=config, autocast_adapter_dtype=not pure_bf16
            )
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as fault:  # what torch and peft raise for shapes and names that do not fit
        raise _does_not_fit(name, base, used, _first_difference(str(fault))) from fault
    except UNREADABLE as fault:  # values that peft does not expect, such as `"alpha_pattern": null`
        raise _unreadable(path, fault) from fault
    _check_names(adapted, path, name, base, used)
    _try_out(adapted, name)
    require_base(adapted, model, name, path)
    if base and Path(base).name != Path(used).name:
        warn(f"adapter {name} was trained on {base}, not on {used}; its shapes fit, so it is used")
    return adapted


def _unreadable(path: Path, fault: BaseException) -> ModelError:
    return ModelError(
        f"{path / 'adapter_config.json'}: the installed peft cannot read this adapter ({fault!r})"
        " -> update peft, or copy or download the adapter again"
    )


def continue_adapter(
    model: "PreTrainedModel", given: GivenAdapters, new_tokens: NewTokens | None = None, *, pure_bf16: bool
) -> "PeftModel":
    """Merge all adapters but the last, which is trained further as its own config says.

    The rows of `new_tokens` are trained and saved with it from now on.
    """
    model = merge_adapters(model, given.names[:-1], given)
    if gives_scores(model.config) and not adapter_gives_scores(adapter_path(given.names[-1], given)):
        raise ModelError(
            f"adapter_name_or_path: {given.names[-1]}: this adapter belongs to a language model without a reward head"
            " -> set create_new_adapter: true, which merges it into the model and starts a new one"
        )
    everything = _all_layers(model) if given.written else ()
    adapted = attach_adapter(model, given.names[-1], given, is_trainable=True, pure_bf16=pure_bf16)
    _warn_of_settings(adapted, everything, given)
    if new_tokens is not None and new_tokens.are_new_to(model):
        adapted = with_new_rows(adapted, new_tokens, pure_bf16=pure_bf16)
        require_base(adapted, unwrap(adapted), given.names[-1], adapter_path(given.names[-1], given))
    info(
        f"adapter {given.names[-1]} is trained further as it is ({describe_adapter(adapted)}); the run file's keys for"
        " a new adapter are not read (create_new_adapter: true would start one)"
    )
    return adapted


def _all_layers(model: "PreTrainedModel") -> list[str]:
    """The full names of the layers that `all` means."""
    ends = find_targets(model, ("all",), "lora_target").modules
    return [name for name, _ in linear_layers(model) if any(name == end or name.endswith(f".{end}") for end in ends)]


def _warn_of_settings(adapted: "PeftModel", everything: Sequence[str], given: GivenAdapters) -> None:
    """What the run file says otherwise; of an adapter on this machine most of it was said before the run began."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    name = given.names[-1]
    if is_hub_id(name):
        config = json.loads((adapter_path(name, given) / "adapter_config.json").read_text("utf-8"))
        for problem in differences(given.written, config, name):
            warn(str(problem))
    layers = (
        (layer, module) for layer, module in unwrap(adapted).named_modules() if isinstance(module, BaseTunerLayer)
    )
    on = [layer for layer, module in layers if not isinstance(module, TrainableTokensLayer)]
    warn_of_targets(given.written, everything, on, name)


def describe_adapter(adapted: "PeftModel") -> str:
    """Its method and size, in words: `LORA, r 8, lora_alpha 16`."""
    config = adapted.peft_config["default"].to_dict()
    sizes = [f"{key} {config[key]}" for key in ("r", "lora_alpha", "oft_block_size") if config.get(key)]
    return ", ".join([str(config["peft_type"].value), *sizes])


def adapter_path(name: str, given: GivenAdapters) -> Path:
    """The local folder of an adapter, downloaded if it is on the hub. Raises `ModelError`."""
    path = Path(local_path(name, given.access)).expanduser()
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        check_adapter_source(name, given.folder, given.access)
        try:
            path = Path(snapshot_download(name, **given.access.options))
        except (OSError, ValueError) as fault:
            reason = str(fault).splitlines()[0]
            raise ModelError(
                f"{name}: there is no adapter folder of this name here, and the hub does not give one ({reason})"
                " -> check adapter_name_or_path"
            ) from fault
    check_adapter_source(str(path), given.folder)
    return path / given.folder if given.folder else path


def _try_out(adapted: "PeftModel", name: str) -> None:
    """Raises `ModelError` for an adapter that needs more than token ids to compute, as some methods of peft do."""
    import torch

    config, base = adapted.peft_config["default"], unwrap(adapted)
    if config.peft_type in ("LORA", "OFT") or base.config.is_encoder_decoder:
        return
    weight: Any = base.get_input_embeddings().weight
    with _possible(name, config, "used"), torch.no_grad():
        adapted(input_ids=torch.zeros(1, 1, dtype=torch.long, device=weight.device))


@contextmanager
def _possible(name: str, config: "PeftConfig", what: str) -> Iterator[None]:
    """What peft raises for a method with which this cannot be done becomes a `ModelError`."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, AttributeError, RuntimeError) as fault:
        reason = (str(fault).strip() or type(fault).__name__).splitlines()[0].rstrip(".")
        raise ModelError(
            f"adapter_name_or_path: {name}: this is an adapter of {_method(config)}, which cannot be {what} here"
            f" ({reason}) -> give an adapter of LoRA or OFT, or use this one in plain peft"
        ) from fault


def _method(config: "PeftConfig") -> str:
    kind: Any = config.peft_type
    return str(getattr(kind, "value", kind)).replace("_", " ").lower()


def _require_mergeable(name: str, config: "PeftConfig") -> None:
    """Raises `ModelError` for methods that change no weight, such as prompt tuning."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    kind: Any = config.peft_type
    if not hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(kind), "merge_and_unload"):
        raise ModelError(
            f"adapter_name_or_path: {name}: this is an adapter of {_method(config)}, which changes no weights, so"
            " it can be neither merged nor trained further here -> give an adapter of LoRA or OFT, or use this one in"
            " plain peft"
        )
    settings = vars(config)
    if settings.get("alora_invocation_tokens") or settings.get("arrow_config"):
        variant = "aLoRA" if settings.get("alora_invocation_tokens") else "Arrow"
        raise ModelError(
            f"adapter_name_or_path: {name}: this is an adapter of {variant}, which changes some tokens of a text only,"
            " so it can be neither merged nor trained further here -> give a plain adapter of LoRA, or use this one in"
            " plain peft"
        )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of the adapter's file. Raises `ModelError` if it cannot be read."""
    from peft.utils.save_and_load import load_peft_weights

    try:
        weights = load_peft_weights(str(path), device="cpu")
        return {name: tuple(tensor.shape) for name, tensor in weights.items()}
    except UNREADABLE as fault:
        raise ModelError(
            f"{path}: the adapter's weights cannot be read ({first_line(fault)}) -> copy or download the adapter again"
        ) from fault


def _make_room(model: "PreTrainedModel", shapes: dict[str, tuple[int, ...]], config: "PeftConfig") -> None:
    """An adapter trained with `resize_vocab` carries an embedding of more rows than the model it started from."""
    rows = [shapes[key][0] for name in embedding_names(model) if (key := f"base_model.model.{name}.weight") in shapes]
    single = vars(config).get("trainable_token_indices") or []
    for indices in single.values() if isinstance(single, dict) else [single]:
        rows.append(max(indices, default=-1) + 1)
    wanted = max(rows, default=0)
    if wanted > num_rows(model):
        info(f"the embedding grows from {num_rows(model):,} to {wanted:,} rows, as the adapter was trained")
        grow_embeddings(model, wanted)


def _first_difference(fault: str) -> str:
    lines = [line.strip() for line in fault.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("size mismatch")), lines[0] if lines else "")


def _does_not_fit(name: str, base: str, used: str, reason: str) -> ModelError:
    if base == used:
        return ModelError(
            f"{name}: this adapter does not fit the model {used}, although it names it as its own ({reason}): its"
            " config and its weights are of different runs, or the model has been replaced since"
            " -> copy or download the adapter's files again, or name the model it was trained on"
        )
    return ModelError(
        f"{name}: this adapter does not fit the model {used}: it was trained on {base or 'another model'} ({reason})"
        " -> set model_name_or_path to the model it was trained on"
    )


def _check_names(adapted: "PeftModel", path: Path, name: str, base: str, used: str) -> None:
    """Every tensor of the adapter has found its place, and every place a tensor."""
    from peft import get_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    config, prefix = adapted.peft_config["default"], str(adapted.base_model.prefix)
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    found = set(
        # Names of before the experts of a mixture were stacked become those of now.
        convert_peft_adapter_state_dict_for_transformers(adapted, config, load_peft_weights(str(path), device="cpu"))
    )
    homeless = {key for key in found if f".{prefix}" in key} - expected
    for keys, words in (
        (expected - found, "has no weights for"),
        (homeless, "has weights for what the model does not have,"),
    ):
        if keys:
            reason = f"it {words} {len(keys)} places such as {min(keys)}"
            raise _does_not_fit(name, base, used, reason)


def check_given(given: GivenAdapters, source: ModelSource, line: Callable[[str], str] = AS_ADAPTERS) -> None:
    """Each adapter is put on what it was trained on. `source`, `line`: see `check_series`. Raises `ModelError`."""
    check_series(given.names, [adapter_path(name, given) for name in given.names], source, line)


def series_beneath(given: GivenAdapters, source: ModelSource, *, creates_new: bool) -> Series:
    """What the adapter that is trained will be on: all adapters before it, after those that an export merged.

    `creates_new`: it is not the last one given. Raises `ModelError` as `check_given` does.
    """
    check_given(given, source)
    names = given.names if creates_new else given.names[:-1]
    return (*merged_into(source), *beneath(names, [adapter_path(name, given) for name in names]))


def given_adapters(keys: "ModelConfig") -> GivenAdapters:
    return GivenAdapters(keys.adapter_name_or_path, keys.adapter_folder, hub_access(keys))
