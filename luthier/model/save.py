"""Models on disk, in the layout of transformers: sharded safetensors, config, generation config, tokenizer.

Weights are written first. Whatever cannot be written after them (a tokenizer, a config that transformers refuses to
save) is noted with its reason, and the weights stay.
"""

import errno
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary

from luthier.config.keys.quantization import LOFTQ_FILE
from luthier.core.errors import RunFailed
from luthier.core.files import DiskFaults
from luthier.model.adapters._loftq import save_record
from luthier.model.adapters._pissa import is_pissa, save_as_lora
from luthier.model.adapters._series import save_series
from luthier.model.classes import is_routed
from luthier.model.features.rope_scaling import BESIDE_ADAPTER
from luthier.model.heads.score_head import VALUE_HEAD_FILE
from luthier.model.loading.loaded import as_it_came
from luthier.model.media.processor import AS_IT_IS, FittedProcessor, copy_processor
from luthier.model.modules import unwrap

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VALUE_HEAD_FILES = (VALUE_HEAD_FILE, "value_head.bin")
"""What a reward model has beside a causal model: a layer from hidden states to one number."""
WEIGHT_FILES = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*.bin*",
    "adapter_*",
    BESIDE_ADAPTER,
    LOFTQ_FILE,
    *VALUE_HEAD_FILES,
)
"""What an earlier model or adapter left in the folder and must not be taken for a part of this one."""


def num_bytes(model: "nn.Module") -> int:
    """What the weights take on disk."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def num_saved_bytes(model: "nn.Module") -> int:
    """Bytes that training will save: of a model with an adapter, only the trainable parameters."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return num_bytes(model)
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters() if weight.requires_grad)
    return 2 * size if is_pissa(model) else size


def save_adapter(model: "PeftModel", folder: Path, state: "Mapping[str, Any] | None" = None) -> None:
    """The adapter as plain peft loads it. `state`: the weights, if gathered from several processes."""
    with _card_rendered_once(model):
        if is_pissa(model):
            save_as_lora(model, folder, state)
        else:
            model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    save_record(model, folder)
    save_series(model, folder)


_cards: "WeakKeyDictionary[PeftModel, str]" = WeakKeyDictionary()
"""Model -> its model card in a new folder."""


@contextmanager
def _card_rendered_once(model: "PeftModel") -> Iterator[None]:
    """While open, peft writes the model card that it has rendered before, which is the same at every checkpoint. To
    render it takes longer than to save a small adapter."""
    render = model.create_or_update_model_card

    def write(output_dir: str) -> None:
        card = Path(output_dir, "README.md")
        if card.exists():
            render(output_dir)
        elif model in _cards:
            card.write_text(_cards[model], encoding="utf-8")
        else:
            render(output_dir)
            _cards[model] = card.read_text(encoding="utf-8")

    vars(model)["create_or_update_model_card"] = write
    try:
        yield
    finally:
        del vars(model)["create_or_update_model_card"]


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)


@dataclass(slots=True)
class Saving:
    """Writes what goes beside the weights: a part that fails is noted, and the others follow.

    with saving("tokenizer"):
        tokenizer.save_pretrained(folder)
    """

    unsaved: dict[str, Exception] = field(default_factory=dict)
    part: str = ""

    def __call__(self, part: str) -> Self:
        self.part = part
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(fault, Exception):
            return False
        self.unsaved[self.part] = fault
        return True


def raise_disk_fault(unsaved: Mapping[str, Exception]) -> None:
    """Raises the `OSError` of a part that the disk did not take, where nothing half-written may stay."""
    for fault in unsaved.values():
        if isinstance(fault, OSError) and fault.errno in _DISK_ERRORS:
            raise fault


def incomplete(folder: Path, unsaved: Mapping[str, Exception], model: str) -> RunFailed:
    """The error about a folder that has the weights and not all that belongs to them. `model`: what they come from."""
    parts = "; ".join(f"{part} ({_reason(fault)})" for part, fault in unsaved.items())
    return RunFailed(f"{folder}: the weights are saved, but not {parts} -> copy what is missing from {model}")


def _reason(fault: Exception) -> str:
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    return f"{type(fault).__name__}: {lines[0]}" if lines else type(fault).__name__


def save_weights(
    model: "PreTrainedModel",
    folder: Path,
    state: "dict[str, Any] | None" = None,
    *,
    is_writer: bool = True,
    max_shard_size: str = "50GB",
) -> None:
    """The weights alone. `state`: the weights, if gathered from several processes, of which one `is_writer`."""
    with _weights_alone(model):
        model.save_pretrained(folder, state_dict=state, is_main_process=is_writer, max_shard_size=max_shard_size)


@contextmanager
def _weights_alone(model: "PreTrainedModel") -> Iterator[None]:
    """While open, `save_pretrained` writes neither config, generation settings nor code, which it would write first."""

    def write_nothing(*args: Any, **options: Any) -> None:
        pass

    owners: list[Any] = [model.config, *([model.generation_config] if model.can_generate() else ())]
    for owner in owners:
        vars(owner)["save_pretrained"] = write_nothing
    vars(model)["is_remote_code"] = lambda: False
    try:
        yield
    finally:
        del vars(model)["is_remote_code"]
        for owner in owners:
            del vars(owner)["save_pretrained"]


def save_beside_weights(
    model: "nn.Module",
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    processor: FittedProcessor,
    more: "Mapping[str, Callable[[], Any]] | None" = None,
) -> dict[str, Exception]:
    """All that is no weight: of a model that is no adapter its config with code and its generation settings, then the
    tokenizer, the processor, and `more`: what it is -> writes it.

    Returns why parts could not be saved; empty if all are.
    """
    saving = Saving()
    base = unwrap(model)
    if base is model:
        with saving("config.json"), DiskFaults(), as_it_came(base):
            _save_config(base, folder)
        if base.can_generate():
            with saving("generation_config.json"), DiskFaults(), as_it_came(base):
                base.generation_config.save_pretrained(folder)
    with saving("the tokenizer"), DiskFaults():
        tokenizer.save_pretrained(folder)
    with saving("the processor"), DiskFaults():
        copy_processor(base, folder, processor)
    for part, write in (more or {}).items():
        with saving(part), DiskFaults():
            write()
    return saving.unsaved


def _save_config(model: "PreTrainedModel", folder: Path) -> None:
    """With the Python files of a model that brings its own."""
    from transformers.dynamic_module_utils import custom_object_save

    from luthier.model.kernels.routed_blocks import name_type

    config: Any = model.config
    if model.is_remote_code():
        custom_object_save(model, str(folder), config=config)
    config.save_pretrained(folder)
    if is_routed(config):
        name_type(folder / "config.json")


def write_model(
    folder: Path,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_shard_size: str = "5GB",
    processor: FittedProcessor = AS_IT_IS,
) -> dict[str, Exception]:
    """Weights in files of at most `max_shard_size`, then config, generation config, tokenizer and chat template.

    `processor`: see `copy_processor`. Returns why parts beside the weights could not be saved; empty if all are.
    The tokenizer pads on the left, as generation wants it. Where the disk fails it raises what the
    libraries raise, which `luthier.core.files.DiskFaults` knows.
    """
    padding_side = tokenizer.padding_side
    tokenizer.padding_side = "left"
    try:
        save_weights(model, folder, max_shard_size=max_shard_size)
        unsaved = save_beside_weights(model, tokenizer, folder, processor)
    finally:
        tokenizer.padding_side = padding_side
    raise_disk_fault(unsaved)
    return unsaved


def copy_value_head(sources: Iterable[str], target: Path) -> Path | None:
    """The value head of the first of the folders that has one (v_head.summary.weight and .bias) goes beside the model.

    Returns the copy, None if none of them has a value head."""
    for source in sources:
        for name in VALUE_HEAD_FILES:
            file = Path(source).expanduser() / name
            if file.is_file():
                return Path(shutil.copyfile(file, target / name))
    return None
