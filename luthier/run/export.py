"""`luthier export RUN`: base model and adapters become one model folder that any program can load."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.core.errors import ModelError, OutputError, RunFailed
from luthier.core.files import require_apart, require_writable, save_folder_atomically
from luthier.core.log import info, warn
from luthier.model.save import num_bytes, write_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from luthier.config.runs import ExportRun
    from luthier.run.encoding import TextSide

WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.*", "*.gguf")


def main(argv: list[str]) -> int:
    from luthier.config.load import read_source
    from luthier.config.runs import ExportRun
    from luthier.run.check import load_checked

    run = load_checked("export", read_source(argv), begins=True)
    assert isinstance(run, ExportRun)
    for warning in run.warnings:
        warn(str(warning))
    folder = export(run)
    for file in sorted(folder.iterdir()):
        info(f"  {file.name}: {file.stat().st_size:,} bytes")
    print(f"exported: {folder}")
    return 0


def export(run: "ExportRun") -> Path:
    """Merge, write, compare, describe, and upload if asked to. Returns the folder, which is whole or not there at all.

    Raises `OutputError` for a folder that must not be written to, `ModelError` for what cannot be merged, `RunFailed`
    if the disk is full, the written model answers differently or the upload fails.
    """
    from luthier.core.manifest import write_manifest
    from luthier.model.load import load_for_export
    from luthier.model.merge_check import Reference
    from luthier.run.encoding import load_text_side
    from luthier.run.merge_check import check_written, sample_prompts

    assert run.export.export_dir, "the rules of the run ask for it"
    target = Path(run.export.export_dir).expanduser()
    check_target(target, run.model.model_name_or_path, run.model.adapter_name_or_path)
    check_mergeable(run)
    text = load_text_side(run)
    reference = Reference(sample_prompts(text.encoding)) if run.export.export_check else None
    model = load_for_export(run, before_merge=reference)
    check_finite(model)
    if reference is not None and not reference.logits:
        reference(model)
    fit_to_text(model, text)
    dtype, attention, facts = model.dtype, model.config._attn_implementation, {}
    with save_folder_atomically(target, needed_bytes=num_bytes(model)) as draft:
        write_model(draft, model, text.tokenizer, max_shard_size=f"{run.export.export_size}GB")
        write_modelfile(draft, text)
        del model
        gc.collect()  # the export is loaded again, and two models may not fit
        if reference is not None:
            facts["merge_check"] = check_written(
                draft,
                reference,
                dtype=dtype,
                attn_implementation=attention,
                device_map="auto" if run.export.export_device == "auto" else None,
                max_mean_kl=run.export.export_max_kl,
            )
        write_manifest(
            draft,
            model=run.model.model_name_or_path,
            adapters=list(run.model.adapter_name_or_path),
            dtype=str(dtype).removeprefix("torch."),
            template=run.data.template,
            **facts,
        )
    if run.export.export_hub_model_id:
        upload(target, run.export.export_hub_model_id, run.model.hf_hub_token)
    return target


def fit_to_text(model: "PreTrainedModel", text: "TextSide") -> None:
    """Rows for all tokens, and the ends of an answer, as the chat format has them."""
    from luthier.infer.decoding import end_ids
    from luthier.model.embeddings import fit_embeddings

    if fit_embeddings(model, text.tokenizer):
        warn("the tokenizer has tokens that the model has never learned; their embeddings are near the mean of all")
    model.generation_config.eos_token_id = list(dict.fromkeys((*text.fitted.stop_token_ids, *end_ids(model))))
    model.generation_config.pad_token_id = text.tokenizer.pad_token_id
    model.generation_config._from_model_config = False  # transformers 4 would derive it anew from config.json


def write_modelfile(folder: Path, text: "TextSide") -> None:
    """For Ollama, unless the chat format is a program, which a Modelfile cannot hold."""
    from luthier.data.modelfile import modelfile

    if text.template.kind != "program":
        own = {"bos_token": text.tokenizer.bos_token, "eos_token": text.tokenizer.eos_token}
        (folder / "Modelfile").write_text(modelfile(text.template, **own), encoding="utf-8")


def check_target(target: Path, model: str, adapters: Sequence[str]) -> None:
    """Nothing that exists may be written over. Raises `OutputError`."""
    require_apart("export_dir", target, (model, *adapters))
    weights = sorted(file.name for pattern in WEIGHT_PATTERNS for file in target.glob(pattern))
    if weights:
        raise OutputError(
            f"export_dir: {target}: holds weights already ({', '.join(weights[:3])}{', ...' * (len(weights) > 3)})"
            " -> name a new folder, or remove this one if nobody needs it"
        )
    require_writable("export_dir", target)


def check_mergeable(run: "ExportRun") -> None:
    """Adapters cannot be merged into weights that a quantiser packed. Raises `ModelError`."""
    from luthier.model.load import load_config

    keys = run.model
    if not keys.adapter_name_or_path:
        return
    config = load_config(
        keys.model_name_or_path,
        revision=keys.model_revision,
        cache_dir=keys.cache_dir,
        token=keys.hf_hub_token,
        trust_remote_code=keys.trust_remote_code,
    )
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization["quant_method"] if isinstance(quantization, dict) else quantization.quant_method
        raise ModelError(
            f"model_name_or_path: {keys.model_name_or_path}: its weights are quantised ({method}), so adapters cannot"
            " be merged into them -> give the model that it was quantised from, or use model and adapter side by side"
        )


def check_finite(model: "PreTrainedModel") -> None:
    """A number too large for a 16-bit format becomes infinite and ruins every answer. Raises `RunFailed`."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise RunFailed(
                f"{name}: not every number of this weight is finite in {str(weight.dtype).removeprefix('torch.')}"
                " -> set infer_dtype: bfloat16 or float32, or check the adapter"
            )


def upload(folder: Path, repository: str, token: str | None) -> None:
    """Push the whole folder to the Hugging Face hub, into a private repository if it is new."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by luthier export")
    except (OSError, ValueError, HfHubHTTPError) as fault:
        raise RunFailed(
            f"export_hub_model_id: {repository}: the upload failed ({fault}); the export itself is whole, in {folder}"
        ) from fault
    info(f"uploaded to {repository}")
