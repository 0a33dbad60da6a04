"""Keys of older transformers that files still carry, and how they reach the current `TrainingArguments`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from luthier.config.keys.fields import no_effect, refused, renamed
from luthier.config.keys.fsdp import fsdp_settings
from luthier.config.keys.training import NOTES, TrainingKeys, read_mapping
from luthier.core.errors import InvalidInput

_APEX = "mixed precision comes from PyTorch itself"
READ_BY_US = (
    *("overwrite_output_dir", "warmup_ratio", "label_smoothing_factor", "neftune_noise_alpha"),
    *("fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap"),
)
"""Keys of `TrainingKeys` that the workflow and the stages read themselves, so that transformers must not see them."""
_NO_TPU = "this version does not run on TPUs"


@dataclass(frozen=True, slots=True, kw_only=True)
class LegacyTrainingConfig:
    overwrite_output_dir: bool = False
    """Start over in an `output_dir` that already holds a model."""
    warmup_ratio: float = 0.0
    """Warm-up as a share of all steps; `warmup_steps` takes precedence."""
    evaluation_strategy: str = renamed("no", "eval_strategy")
    """Former name of `eval_strategy`."""
    per_gpu_train_batch_size: int | None = renamed(None, "per_device_train_batch_size")
    """Former name of `per_device_train_batch_size`."""
    per_gpu_eval_batch_size: int | None = renamed(None, "per_device_eval_batch_size")
    """Former name of `per_device_eval_batch_size`."""
    no_cuda: bool = renamed(False, "use_cpu")
    """Former name of `use_cpu`."""
    push_to_hub_token: str | None = renamed(None, "hub_token")
    """Former name of `hub_token`. Never printed."""
    push_to_hub_model_id: str | None = renamed(None, "hub_model_id")
    """Former name of `hub_model_id`."""
    torchdynamo: str | None = renamed(None, "torch_compile_backend")
    """Former name of `torch_compile_backend`."""
    xpu_backend: str | None = renamed(None, "ddp_backend")
    """Former name of `ddp_backend`."""
    logging_dir: str | None = no_effect(
        None, "transformers 5 takes the folder of TensorBoard from TENSORBOARD_LOGGING_DIR"
    )
    """Folder for TensorBoard."""
    include_tokens_per_second: bool = no_effect(False, "tokens per second are always logged, as throughput", (True,))
    """Report the speed in tokens per second."""
    save_safetensors: bool = refused(True, "weights are saved as safetensors only", "leave it out")
    """Save weights as safetensors."""
    group_by_length: bool = renamed(False, "train_sampling_strategy", becomes="group_by_length")
    """Put rows of similar length into one batch."""
    adafactor: bool = renamed(False, "optim", becomes="adafactor")
    """Use the optimizer Adafactor."""
    fsdp_min_num_params: int = 0
    """Smallest module that FSDP shards, as `min_num_params` in `fsdp_config`."""
    fsdp_transformer_layer_cls_to_wrap: str | None = None
    """Class of layers that FSDP shards, as `transformer_layer_cls_to_wrap` in `fsdp_config`."""
    dispatch_batches: bool | None = refused(
        None, "transformers 5 has it under another name", "use accelerator_config: {dispatch_batches: ...}"
    )
    """Read batches in the first process and send them to the others."""
    split_batches: bool | None = refused(
        None, "transformers 5 has it under another name", "use accelerator_config: {split_batches: ...}"
    )
    """Count a batch over all devices."""
    include_inputs_for_metrics: bool = refused(
        False, "transformers 5 has it under another name", "use include_for_metrics: inputs"
    )
    """Pass the inputs to the metrics."""
    sharded_ddp: str = refused("", "transformers no longer has it", "use fsdp")
    """Shard weights with fairscale."""
    past_index: int = refused(-1, "transformers no longer has it", "leave it out")
    """Output that holds the state of earlier tokens."""
    use_ipex: bool = no_effect(False, "transformers no longer has it")
    """Use Intel's extension of PyTorch."""
    jit_mode_eval: bool = no_effect(False, "transformers no longer has it")
    """Compile the model for evaluation."""
    use_legacy_prediction_loop: bool = no_effect(False, "there is one evaluation loop only")
    """Use the older evaluation loop."""
    use_mps_device: bool = no_effect(False, "an Apple GPU is used whenever there is one")
    """Use an Apple GPU."""
    half_precision_backend: str = no_effect("auto", _APEX)
    """Library for mixed precision."""
    fp16_backend: str = no_effect("auto", _APEX)
    """Library for mixed precision."""
    fp16_opt_level: str = no_effect("O1", _APEX)
    """Level of mixed precision in apex."""
    mp_parameters: str = no_effect("", "SageMaker's launcher sets it")
    """Settings of SageMaker."""
    ray_scope: str | None = no_effect("last", "this version does not search hyper-parameters")
    """Which trial of a search counts."""
    push_to_hub_organization: str | None = no_effect(None, "the organization is part of hub_model_id")
    """Organization on the hub."""
    tpu_num_cores: int | None = no_effect(None, _NO_TPU)
    """Cores of a TPU."""
    tpu_metrics_debug: bool = no_effect(False, _NO_TPU)
    """Print numbers of a TPU."""


def training_arguments_kwargs(keys: TrainingKeys) -> dict[str, Any]:
    """What to give to the `Seq2SeqTrainingArguments` of the installed transformers: the user's keys, in today's names.

    `warmup_ratio` becomes a fractional `warmup_steps` (unless that is given too). Keys without effect here, and those
    of `READ_BY_US`, are left out; tuples become lists. Raises `InvalidInput` for keys that the installed version lacks.
    """
    import transformers

    kwargs = {
        name: list(value) if isinstance(value, tuple) else _plain(value)
        for name, value in keys.given.items()
        if name not in NOTES and name not in READ_BY_US
    }
    if keys["fsdp"]:
        kwargs |= {"fsdp": True, "fsdp_config": _fsdp_config(keys)}
    if keys["warmup_ratio"] and not keys["warmup_steps"]:
        kwargs["warmup_steps"] = keys["warmup_ratio"]
    unknown = kwargs.keys() - {field.name for field in dataclasses.fields(transformers.Seq2SeqTrainingArguments)}
    if unknown:
        version, names = transformers.__version__, ", ".join(sorted(unknown))
        raise InvalidInput(f"transformers {version}, which is installed here, does not know {names}: leave them out")
    return kwargs


def _fsdp_config(keys: TrainingKeys) -> dict[str, Any]:
    settings = fsdp_settings(keys, read_mapping("fsdp_config", keys["fsdp_config"]))
    if settings.problems:
        raise InvalidInput("\n  ".join(map(str, settings.problems)))
    return settings.values


def _plain(value: Any) -> Any:
    """A dict that transformers may write into, so that the run keeps its own."""
    return dict(value) if isinstance(value, Mapping) else value
