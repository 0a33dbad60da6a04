"""Models with their adapters merged: to generate text, to export, to be asked beside the policy."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from luthier.config.runs import TrainRun
from luthier.core.machine import Machine, detect
from luthier.model.adapters._loftq import read_record, round_weights
from luthier.model.adapters._merge import adapter_path, attach_unmerged, check_given, given_adapters, merge_adapters
from luthier.model.classes import is_routed
from luthier.model.dtype import inference_dtype
from luthier.model.files.sources import ModelSource, model_source
from luthier.model.loading.base import inference_dtype_of, load_base, purpose_of
from luthier.model.loading.config import load_config
from luthier.model.loading.features import change_model
from luthier.model.quantization._layers import Quantization, is_quantized, plan

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from luthier.config.keys.quantization import QuantizationConfig
    from luthier.config.runs import ExportRun, InferRun, Run


def load_for_inference(
    run: "InferRun | TrainRun", source: ModelSource, machine: Machine, scores: bool = False
) -> "PreTrainedModel":
    """The model with all adapters of the run, in evaluation mode, where it computes fastest.

    To write answers all are merged. An evaluation has the last one beside the weights, as training had it, so its
    numbers are those of training to the last digit. Into quantized weights nothing can be merged.
    """
    may_offload = machine.num_accelerators > 0 or "offload_folder" in run.given
    return load_merged(
        run,
        source,
        machine,
        partial(inference_dtype_of, run, machine=machine),
        device_map=device_map_of(machine),
        offload_folder=run.model.offload_folder if may_offload else None,
        quantization=plan(run.quantization, machine),
        scores=scores,
        merges_last=not isinstance(run, TrainRun),
    )


def device_map_of(machine: Machine) -> "str | dict[str, str] | None":
    """All devices for a single process; each of several has its own."""
    if not machine.num_accelerators:
        return None
    return "auto" if machine.world_size == 1 else {"": f"{machine.device}:{machine.local_rank}"}


def load_for_export(
    run: "ExportRun",
    machine: Machine | None = None,
    before_merge: "Callable[[PeftModel], None] | None" = None,
    *,
    source: ModelSource | None = None,
) -> "PreTrainedModel":
    """The model with all adapters of the run merged, in the number format it is to be saved in.

    `infer_dtype: auto` keeps that of the checkpoint, whatever this machine computes best. `before_merge` is called with
    the model and each adapter before that adapter is merged. `source`: of the model, if it is located already.
    """
    machine = machine or detect()

    def choose_dtype(*, checkpoint: "torch.dtype | None") -> "torch.dtype":
        if run.model.infer_dtype == "auto" and checkpoint is not None:
            return checkpoint
        return inference_dtype(run.model.infer_dtype, checkpoint=checkpoint, machine=machine)

    return load_merged(
        run,
        source or model_source(run.model),
        machine,
        choose_dtype,
        device_map="auto" if run.export.export_device == "auto" else None,
        before_merge=before_merge,
        unpacks=True,
        scores=None,
        rounding=run.quantization,
    )


def load_merged(
    run: "Run",
    source: ModelSource,
    machine: Machine,
    choose_dtype: "Callable[..., torch.dtype]",
    *,
    device_map: "str | dict[str, str] | None" = None,
    offload_folder: str | None = None,
    before_merge: "Callable[[PeftModel], None] | None" = None,
    quantization: Quantization | None = None,
    unpacks: bool = False,
    scores: bool | None = False,
    rounding: "QuantizationConfig | None" = None,
    merges_last: bool = True,
) -> "PreTrainedModel":
    """The model with all adapters merged, or the last one beside the weights, in evaluation mode.

    `choose_dtype`, `unpacks`: see `load_base`. `offload_folder`: see `placement`. `scores`: whether a reward model is
    wanted, None for either kind. `merges_last`: the last adapter too, but for quantized weights. `rounding`: an adapter
    of LoftQ is merged into what these keys make of the weights.
    """
    given = given_adapters(run.model)
    config = load_config(source)
    check_given(given, source)
    purpose = purpose_of(run, machine)
    model = load_base(
        run,
        source,
        config,
        purpose,
        choose_dtype=choose_dtype,
        quantization=quantization,
        device_map=device_map,
        offload_folder=offload_folder,
        unpacks=unpacks or bool(given),
        scores=scores,
    ).model
    change_model(run, model, purpose)
    if given and rounding is not None and (record := read_record(adapter_path(given.names[0], given))) is not None:
        round_weights(model, plan(rounding, machine), record)
    if is_quantized(model) or not merges_last:
        model = attach_unmerged(model, given)
    else:
        model = merge_adapters(model, given.names, given, before_merge)
    model.config.use_cache = run.model.use_kv_cache and not is_routed(model.config)
    return model.eval()
