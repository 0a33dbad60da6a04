"""What a command needs before it begins: the model, the adapters, the libraries of the chosen keys.

All of it is checked without importing torch and without a network.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from luthier.config.keys.fp8 import installed_backend, missing_library
from luthier.config.keys.hubs import hub_in_use
from luthier.config.keys.swanlab import MINIMUM
from luthier.config.rules.bridge import under_megatron
from luthier.config.runs import ExportRun, InferRun, Run, TrainRun
from luthier.config.sections import is_on
from luthier.core.errors import ModelError, Problem
from luthier.core.kinds import ENGINES, QUANTIZERS
from luthier.core.versions import is_installed
from luthier.infer.servers.child import find_program
from luthier.model.adapters._series import AS_ADAPTERS, check_series
from luthier.model.files.sources import ModelSource, check_adapter_source, check_source, is_hub_id, model_source
from luthier.model.quantization._layers import missing_library as missing_quantizer
from luthier.model.quantization._prequantized import (
    GPTQ_LIBRARIES,
    prequantized_format_in,
    problems_with,
    training_problems,
)
from luthier.model.tokenizer import read_new_special_tokens
from luthier.stages._reward import RewardConfig
from luthier.training.checkpoints.store import FROM_SCRATCH, NO_FOLDER, checkpoints_in, none_in, others_than
from luthier.workflow.megatron import bridge, mcore

TRACKER_MODULES = {
    "azure_ml": "azureml",
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet_ml",
    "dagshub": "dagshub",
    "dvclive": "dvclive",
    "flyte": "flytekit",
    "mlflow": "mlflow",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
"""Name in `report_to` -> the module it logs through."""
AUTO_REMEDY = "leave it out: the last checkpoint in output_dir is resumed from anyway; with true there must be one"
"""For the word of LLaMA-Factory's v1."""
METRIC_MODULES = ("nltk", "jieba", "rouge_chinese")


def source_problems(run: Run) -> Iterator[Problem]:
    """Problems with the folders of the model and its adapters. Names on a hub are not checked."""
    yield from hub_problems(run)
    keys = run.model
    from_scratch = isinstance(run, TrainRun) and keys.train_from_scratch
    try:
        if keys.model_name_or_path and not is_hub_id(keys.model_name_or_path):
            check_source(model_source(keys), weights=not from_scratch)
            yield from prequantized_problems(run)
    except ModelError as error:
        yield _about("model_name_or_path", keys.model_name_or_path, error)
    faults, key, names = [], "adapter_name_or_path", keys.adapter_name_or_path
    for name in names:
        try:
            if not is_hub_id(name):
                check_adapter_source(name, keys.adapter_folder)
        except ModelError as error:
            faults.append(_about(key, name, error))
    yield from faults or series_problems(key, names, model_source(keys), keys.adapter_folder, AS_ADAPTERS)


def token_file_problems(run: Run) -> Iterator[Problem]:
    """A file of new tokens that cannot be read."""
    key, file = "new_special_tokens_config", run.features.new_tokens.new_special_tokens_config
    if file:
        try:
            read_new_special_tokens(Path(file))
        except ModelError as error:
            reason, _, remedy = str(error).removeprefix(f"{key}: ").removeprefix(f"{file}: ").partition(" -> ")
            yield Problem(key, reason, remedy)


def checkpoint_problems(run: TrainRun) -> Iterator[Problem]:
    """A checkpoint to resume from that is not there. Whether it is whole is found out when training begins."""
    key, name, output_dir = "resume_from_checkpoint", run.training["resume_from_checkpoint"], run.training["output_dir"]
    word = str(name or "").lower()
    if not run.trains or word in ("", "false"):
        return
    if word == "true":
        if output_dir and not under_megatron(run) and not checkpoints_in(Path(output_dir)):
            yield Problem(key, none_in(output_dir), FROM_SCRATCH)
    else:
        folder = Path(str(name)).expanduser()
        if not folder.is_dir():
            remedy = AUTO_REMEDY if word == "auto" else others_than(folder)
            yield Problem(key, NO_FOLDER, remedy, value=name, has_value=True)


def series_problems(
    key: str, names: Sequence[str], source: ModelSource, folder: str | None, line: Callable[[str], str]
) -> Iterator[Problem]:
    """An adapter that was trained on top of others, if it is put on something else. `line`: see `check_series`.

    What is on a hub is compared when it has been fetched.
    """
    if Path(source.name).expanduser().exists() and not any(map(is_hub_id, names)):
        folders = [Path(name, folder or "").expanduser() for name in names]
        try:
            check_series(names, folders, source, line)
        except ModelError as error:
            yield _about(key, str(error).partition(": ")[0], error)


def prequantized_problems(run: Run) -> Iterator[Problem]:
    """Why a local prequantized model cannot be loaded or trained, if so."""
    found = prequantized_format_in(Path(run.model.model_name_or_path))
    if found is not None:
        yield from problems_with(found[1])
        if isinstance(run, TrainRun) and run.trains:
            yield from training_problems(found[1], run)


def hub_problems(run: Run) -> Iterator[Problem]:
    """The missing library of the hub that the environment names, if a model is to come from there."""
    hub = hub_in_use()
    keys = run.model
    if hub is None or is_installed(hub.module):
        return
    for key, name in (
        ("model_name_or_path", keys.model_name_or_path),
        *(("adapter_name_or_path", name) for name in keys.adapter_name_or_path),
    ):
        if name and is_hub_id(name):
            reason = f"{hub.variable} asks for models of {hub.title}, and its library {hub.module} is not installed"
            yield Problem(key, reason, f"pip install 'luthier[{hub.extra}]'", value=name, has_value=True)


def quantizer_problems(run: Run) -> Iterator[Problem]:
    """The missing library of the quantization method, if any."""
    if isinstance(run, ExportRun):
        missing_ones = [name for name in GPTQ_LIBRARIES if not is_installed(name)]
        if run.export.export_quantization_bit is not None and missing_ones:
            yield _missing("export_quantization_bit", missing_ones[0], "pip install 'luthier[gptq]'")
        return
    keys = run.quantization
    quantizes = keys.quantization_bit is not None and keys.quantization_method in QUANTIZERS.names
    if quantizes and (missing := missing_quantizer(keys)):
        yield _missing("quantization_method", *missing)


def engine_problems(run: Run) -> Iterator[Problem]:
    """The missing program of the engine that generates text, if any."""
    if isinstance(run, InferRun) and run.model.infer_backend in ENGINES.names:
        engine = ENGINES.get(run.model.infer_backend)
        if engine.program and find_program(engine.program) is None:
            yield Problem("infer_backend", f"there is no program {engine.program} here", engine.install)
    method = run.method if isinstance(run, TrainRun) else None
    starts_vllm = isinstance(method, RewardConfig) and (method.rollout_backend, method.rollout_server) == ("vllm", None)
    if starts_vllm and find_program("vllm") is None:
        remedy = f"{ENGINES.get('vllm').install}, or give the address of a server as rollout_server"
        yield Problem("rollout_backend", "there is no program vllm here", remedy)


def _about(key: str, name: str, error: ModelError) -> Problem:
    reason, _, remedy = str(error).removeprefix(f"{name}: ").partition(" -> ")
    return Problem(key, reason, remedy, value=name, has_value=True)


def library_problems(run: TrainRun) -> Iterator[Problem]:
    """The optional libraries that a training run needs and that are not installed."""
    report_to = run.training["report_to"]
    for name in [report_to] if isinstance(report_to, str) else report_to or ():
        if name in TRACKER_MODULES and not is_installed(TRACKER_MODULES[name]):
            yield _missing("report_to", TRACKER_MODULES[name], f"pip install {name.replace('_', '-')}")
    if run.swanlab.use_swanlab and not is_installed("swanlab"):
        yield _missing("use_swanlab", "swanlab", f"pip install '{MINIMUM}'")
    if is_on(os.environ, "USE_MCA") and not is_installed("mcore_adapter"):
        remedy = f"{mcore.INSTALL}, with megatron-core"
        yield replace(_missing("USE_MCA", "mcore_adapter", remedy), file="environment")
    if is_on(os.environ, "USE_MEGATRON_BRIDGE") and not (is_installed("megatron") and is_installed("megatron.bridge")):
        missing = _missing("USE_MEGATRON_BRIDGE", "megatron.bridge", bridge.INSTALL)
        yield replace(missing, file="environment")
    if is_on(os.environ, "USE_RAY") and not is_installed("ray"):
        yield replace(_missing("USE_RAY", "ray", "pip install 'luthier[ray]'"), file="environment")
    if run.fp8.fp8 and installed_backend(run.fp8) is None:
        yield _missing("fp8", *missing_library(run.fp8))
    if run.training["deepspeed"] is not None and not is_installed("deepspeed"):
        yield _missing("deepspeed", "deepspeed", "pip install 'luthier[deepspeed]'")
    if run.finetuning.plot_loss and not is_installed("matplotlib"):
        yield _missing("plot_loss", "matplotlib", "pip install 'luthier[plot]'")
    if run.training["predict_with_generate"]:
        for module in METRIC_MODULES:
            if not is_installed(module):
                yield _missing("predict_with_generate", module, "pip install 'luthier[metrics]'")


def _missing(key: str, module: str, remedy: str) -> Problem:
    return Problem(key, f"needs the library {module}, which is not installed", remedy)
