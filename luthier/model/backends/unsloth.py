"""`use_unsloth`: a model that the library unsloth loads, adapts and computes with kernels of its own. It needs a GPU.

The library replaces forward functions of transformers as it is imported and as it loads, so it is imported before
any model class of transformers is; configs and tokenizers may be there already. What it puts in their place

- does not support rows that are concatenated without padding, so rows are padded;
- computes logits at all positions, whatever `logits_to_keep` says; `luthier.model.heads.output_head` finds out by a
  trial;
- cuts off what is longer than `max_seq_length`, and stretches positions if that is longer than the model's window.

Facts from unsloth 2026.10: `unsloth/models/loader.py` and `unsloth/models/llama.py`.
"""

import importlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.rules.unsloth import INSTALL
from luthier.core.errors import MissingExtra, ModelError
from luthier.core.kinds import ADAPTERS
from luthier.core.log import info
from luthier.core.machine import Machine
from luthier.core.versions import is_installed
from luthier.model.adapters import lora
from luthier.model.adapters._merge import adapter_path, check_given, given_adapters, series_beneath
from luthier.model.adapters._series import note_beneath
from luthier.model.attention import Attention, Trial
from luthier.model.backends import Backend
from luthier.model.classes import checkpoint_dtype, require_kind
from luthier.model.dtype import upcast_trainable
from luthier.model.embeddings import NewRows
from luthier.model.files.readable import readable
from luthier.model.files.sources import ModelFiles, ModelSource, check_source
from luthier.model.loading.base import dtype_of, inference_dtype_of
from luthier.model.loading.config import load_config
from luthier.model.loading.loaded import keep_use_cache, repair_generation_config, require_causal
from luthier.model.loading.parameters import parts_to_freeze, report_parameters
from luthier.model.modules import unwrap
from luthier.model.types import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from luthier.config.keys.model import ModelConfig
    from luthier.config.keys.quantization import QuantizationConfig
    from luthier.config.runs import InferRun, TrainRun
    from luthier.model.tokenizer import FittedTokenizer

PADDING_REASON = "the forward functions of unsloth attend across the samples of a row"
DEVICES = ("cuda", "xpu", "npu")
"""Types of devices that it has kernels for; AMD's are cuda to torch."""


def import_unsloth(machine: Machine) -> Any:
    """The class `FastLanguageModel`. Raises `ModelError` without a GPU and `MissingExtra` without the library."""
    if machine.device not in DEVICES:
        raise ModelError(
            f"use_unsloth: its kernels need a GPU of NVIDIA, AMD or Intel, and this machine computes on its"
            f" {'CPU' if machine.device == 'cpu' else machine.device} -> leave it out; rows are not padded then, and"
            " logits computed at labeled positions only"
        )
    if not is_installed("unsloth"):
        raise MissingExtra(f"use_unsloth needs the library `unsloth`, which is not installed: {INSTALL}")
    return importlib.import_module("unsloth").FastLanguageModel


def load_for_training(
    run: "TrainRun",
    source: ModelSource,
    fitted: "FittedTokenizer",
    machine: Machine,
    scores: bool,
    recomputed_layers: int | None = None,
    trial: Trial | None = None,
) -> LoadedModel:
    """The library recomputes layers in its own way, so `recomputed_layers` is None. Raises `ModelError`."""
    import torch

    if trial is not None:
        raise ModelError("use_unsloth: rows with images are trained without this library -> leave it out")

    keys, pure_bf16 = run.model, run.finetuning.pure_bf16
    fast = import_unsloth(machine)
    config = load_config(source)
    torch.manual_seed(run.training["seed"])
    dtype = dtype_of(run)
    require_kind(keys.model_name_or_path, config, scores=False)
    # "unsloth" parks the inputs of layers in main memory, as `use_unsloth_gc` does; the library's own default.
    recomputes: str | bool = False if keys.disable_gradient_checkpointing else "unsloth"
    beneath = series_beneath(given_adapters(keys), source, creates_new=False)
    is_full, seed = not ADAPTERS.get(run.finetuning_type).adds_weights, run.training["seed"]
    of_full: dict[str, Any] = {"full_finetuning": True, "float32_mixed_precision": not pure_bf16} if is_full else {}
    model = _load(
        fast,
        source,
        keys,
        run.quantization,
        machine,
        dtype=dtype,
        max_seq_length=longest_row(config, run.data.cutoff_len, run.generating.max_new_tokens),
        use_gradient_checkpointing=recomputes,
        random_state=seed,
        **of_full,
    )
    require_causal(unwrap(model))
    if not is_full and not keys.adapter_name_or_path:
        has_new = bool(fitted.added_tokens)
        model = _adapt(fast, model, run, has_new, use_gradient_checkpointing=recomputes, random_state=seed)
    if not pure_bf16:
        upcast_trainable(model)
    unwrap(model).config.use_cache = False
    model.train()
    note_beneath(model, beneath)
    trainable, total = report_parameters(model, one_by_one=keys.print_param_status)
    return LoadedModel(model, dtype, Attention("unsloth"), trainable, total, PADDING_REASON)


def load_for_inference(
    run: "InferRun | TrainRun", source: ModelSource, machine: Machine, scores: bool
) -> "PreTrainedModel":
    """The model, its one adapter beside its weights, in unsloth's way of generating text. Raises `ModelError`."""
    fast = import_unsloth(machine)
    keys = run.model
    config = load_config(source)
    check_given(given_adapters(keys), source)
    require_kind(keys.model_name_or_path, config, scores=False)
    dtype = inference_dtype_of(run, checkpoint=checkpoint_dtype(config), machine=machine)
    longest = window_of(config) or longest_row(config, run.data.cutoff_len, run.generating.max_new_tokens)
    model = _load(fast, source, keys, run.quantization, machine, dtype=dtype, max_seq_length=longest)
    fast.for_inference(model)
    base = unwrap(model)
    base.config.use_cache = keys.use_kv_cache
    return base.eval()


def window_of(config: "PreTrainedConfig") -> int | None:
    """The tokens that the model reads, None for one without positions."""
    window: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return window


def longest_row(config: "PreTrainedConfig", cutoff_len: int, max_new_tokens: int) -> int:
    """`max_seq_length`, in tokens: room for a row and an answer, padded to a multiple of 64, within the window.

    Raises `ModelError` for rows longer than the window, for which unsloth would stretch the positions.
    """
    wanted = -(-(cutoff_len + max(max_new_tokens, 0)) // 64) * 64
    window = window_of(config)
    if window is None:
        return wanted
    if cutoff_len > window:
        raise ModelError(
            f"cutoff_len: {cutoff_len}: the model reads {window:,} tokens, and unsloth would stretch its positions"
            f" -> set cutoff_len: {window}, or leave use_unsloth out"
        )
    return min(wanted, window)


def _load(
    fast: Any,
    source: ModelSource,
    keys: "ModelConfig",
    quantization: "QuantizationConfig",
    machine: Machine,
    **how: Any,
) -> Any:
    """The model, or the peft model around it if the run names an adapter."""
    files = source.files
    check_source(source)
    if files.gguf_file:
        raise ModelError(f"{files}: unsloth trains no GGUF files -> give the model it was made from")
    # The library counts its users on the network if it may use one.
    fetch: dict[str, Any] = {"local_files_only": True} if files.is_local else source.access.options
    bits = quantization.quantization_bit
    with readable(files, "weights"), _as_unsloth_reads(keys, files) as name:
        model, _ = fast.from_pretrained(
            model_name=name,
            load_in_4bit=bits == 4,
            load_in_8bit=bits == 8,
            device_map={"": f"{machine.device}:{machine.local_rank}"},
            trust_remote_code=source.trust_remote_code,
            use_exact_model_name=True,  # it would take a quantized copy of its own from the hub
            fix_tokenizer=False,  # the one of the run is fitted already
            **fetch,
            **how,
        )
    base = unwrap(model)
    base.name_or_path = base.config.name_or_path = keys.model_name_or_path
    if base is not model:
        model.peft_config["default"].base_model_name_or_path = keys.model_name_or_path
    repair_generation_config(base)
    keep_use_cache(base)
    return model


@contextmanager
def _as_unsloth_reads(keys: "ModelConfig", source: ModelFiles) -> Iterator[str]:
    """The folder or hub id to give it. It takes the base of an adapter from the adapter's config, so that names it.

    The folder is one of links to the files of the adapter, and lasts as long as the context.
    """
    given = given_adapters(keys)
    if not given:
        yield source.name
        return
    folder = adapter_path(given.names[0], given)
    if (settings := json.loads((folder / "adapter_config.json").read_text("utf-8")))["peft_type"] != "LORA":
        raise ModelError(f"{given.names[0]}: unsloth loads adapters of LoRA only -> leave use_unsloth out")
    with tempfile.TemporaryDirectory(prefix="luthier-adapter-") as place:
        for file in folder.iterdir():
            if file.name.startswith("adapter_model."):
                Path(place, file.name).symlink_to(file.resolve())
        settings["base_model_name_or_path"] = source.name
        Path(place, "adapter_config.json").write_text(json.dumps(settings), "utf-8")
        yield place
    info(f"adapter {given.names[0]} put beside the weights by unsloth")


def _adapt(fast: Any, model: Any, run: "TrainRun", has_new: bool, **how: Any) -> Any:
    """`has_new`: there are tokens that the model has never seen. unsloth trains no single rows."""
    frozen = parts_to_freeze(model, run.finetuning, sees=False)
    settings = lora.settings_for(model, run.adapter, rows=NewRows(is_whole=has_new), frozen=frozen)
    return fast.get_peft_model(
        model,
        r=settings.r,
        target_modules=sorted(settings.target_modules or ()),
        target_parameters=settings.target_parameters,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        modules_to_save=settings.modules_to_save,
        **how,
    )


BACKEND = Backend(
    name="unsloth",
    is_chosen=lambda run: run.model.use_unsloth,
    load_for_training=load_for_training,
    load_for_inference=load_for_inference,
)
