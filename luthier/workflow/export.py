"""`luthier export RUN`: base model and adapters become one model folder that any program can load."""

import gc
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import InvalidInput, ModelError, OutputError, RunFailed
from luthier.core.files import require_apart, require_writable, save_folder_atomically, write_atomically
from luthier.core.log import info, warn
from luthier.core.versions import is_installed, missing_extra
from luthier.model.adapters._series import MERGED, as_json
from luthier.model.files.hubs import fetched
from luthier.model.files.sources import ModelSource, model_source
from luthier.model.heads.score_head import fit_scorer
from luthier.model.media.processor import fit_processor
from luthier.model.quantization._prequantized import GPTQ_LIBRARIES
from luthier.model.save import copy_value_head, incomplete, num_bytes, write_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from luthier.config.runs import ExportRun
    from luthier.model.adapters._merge_check import Reference
    from luthier.model.adapters._series import Series
    from luthier.workflow.text import TextSide

PLAIN = "unquantized"
"""Where the weights lie until they are quantized, inside of the folder that is being written."""
WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.*", "*.gguf")


def export(run: "ExportRun") -> Path:
    """Merge, write, compare, describe, and upload if asked to. Returns the folder, which is whole or not there at all.

    If a config or the tokenizer cannot be saved, the folder holds the weights and what could be. Raises `OutputError`
    for a folder that must not be written to, `ModelError` for what cannot be merged, `RunFailed` if not everything is
    saved, the disk is full, the written model answers differently or the upload fails.
    """
    from luthier.core.manifest import write_manifest
    from luthier.model.adapters._merge import given_adapters, series_beneath
    from luthier.model.adapters._merge_check import Reference
    from luthier.model.loading.merged import load_for_export
    from luthier.model.quantization._gptq import group_size_for
    from luthier.workflow.merge_check import sample_prompts
    from luthier.workflow.text import load_text_side

    assert run.export.export_dir, "the rules of the run ask for it"
    target = Path(run.export.export_dir).expanduser()
    check_target(target, run.model.model_name_or_path, run.model.adapter_name_or_path)
    source = model_source(run.model)
    check_mergeable(run, source)
    check_gguf(run, source)
    check_quantizable(run, source)
    series = series_beneath(given_adapters(run.model), source, creates_new=True)
    text = load_text_side(run, source)
    processor, samples = fit_processor(run, source), calibration(run, text)
    reference = Reference(sample_prompts(text.encoding)) if run.export.export_check else None
    model = load_for_export(run, before_merge=reference, source=source)
    check_finite(model)
    if reference is not None and not reference.logits:
        reference(model)
    fit_to_text(model, text)
    group_size = group_size_for(model) if samples else 0
    attention = model.config._attn_implementation
    with save_folder_atomically(
        target, needed_bytes=num_bytes(model) * (2 if run.export.export_gguf or samples else 1)
    ) as draft:
        plain = draft / PLAIN if samples else draft
        shards = f"{run.export.export_size}GB"
        unsaved = write_model(plain, model, text.tokenizer, max_shard_size=shards, processor=processor)
        dtype, writes_words = model.dtype, model.can_generate()
        del model
        gc.collect()  # the export is loaded again, and two models may not fit
        if not unsaved:
            if samples:
                quantize(draft, run, samples, group_size, dtype)
            gguf = write_extra_files(draft, run, text, writes_words=writes_words)
            checks = check_export(draft, gguf, run, source, reference, dtype=dtype, attn_implementation=attention)
            write_manifest(draft, **facts_of(run, series, dtype, checks))
    if unsaved:
        raise incomplete(target, unsaved, run.model.model_name_or_path)
    if run.export.export_hub_model_id:
        upload(target, run.export.export_hub_model_id, run.model.hf_hub_token)
    return target


def facts_of(run: "ExportRun", series: "Series", dtype: "torch.dtype", checks: dict[str, Any]) -> dict[str, Any]:
    """For the manifest. `series`: all adapters that are merged now."""
    facts: dict[str, Any] = {"model": run.model.model_name_or_path, "adapters": list(run.model.adapter_name_or_path)}
    facts |= {MERGED: as_json(series)} if series else {}
    facts |= {"dtype": str(dtype).removeprefix("torch."), "template": run.data.template}
    bits = run.export.export_quantization_bit
    return {**facts, **({"gptq_bits": bits} if bits is not None else {}), **({"merge_check": checks} if checks else {})}


def calibration(run: "ExportRun", text: "TextSide") -> list[list[int]]:
    """The token ids that GPTQ measures the model on; none if the export is not quantized. Raises `DataError`."""
    from luthier.data.calibration import read_texts, windows

    keys = run.export
    if keys.export_quantization_bit is None:
        return []
    assert keys.export_quantization_dataset, "the rules of the run ask for it"
    texts = read_texts(keys.export_quantization_dataset, cache_dir=run.model.cache_dir, token=run.model.hf_hub_token)
    num_samples, num_tokens = keys.export_quantization_nsamples, keys.export_quantization_maxlen
    return windows(texts, text.tokenizer, num_samples=num_samples, num_tokens=num_tokens)


def quantize(draft: Path, run: "ExportRun", samples: list[list[int]], group_size: int, dtype: "torch.dtype") -> None:
    """Replace the plain model inside `draft` by the quantized one. Raises `RunFailed`."""
    from luthier.model.quantization._gptq import quantize_folder

    keys, plain = run.export, draft / PLAIN
    assert keys.export_quantization_bit is not None
    info(f"GPTQ: {keys.export_quantization_bit} bits, measured on {len(samples)} pieces of {len(samples[0]):,} tokens")
    quantize_folder(
        plain,
        draft,
        samples,
        bits=keys.export_quantization_bit,
        group_size=group_size,
        max_shard_size=f"{keys.export_size}GB",
        dtype=dtype,
        on_cpu=keys.export_device == "cpu",
        trust_remote_code=run.model.trust_remote_code,
    )
    for file in plain.iterdir():  # the tokenizer and what else goes with the weights, as `write_model` wrote it
        if not file.name.startswith("model") and file.name != "config.json":
            file.replace(draft / file.name)
    shutil.rmtree(plain)


def fit_to_text(model: "PreTrainedModel", text: "TextSide") -> None:
    """Rows for all tokens, and the ends of an answer, as the chat format has them."""
    from luthier.infer.decoding import end_ids
    from luthier.model.embeddings import add_missing_rows

    add_missing_rows(model, text.tokenizer, text.source)
    if not model.can_generate():
        fit_scorer(model, text.tokenizer.pad_token_id)
        return
    model.generation_config.eos_token_id = list(dict.fromkeys((*text.fitted.stop_token_ids, *end_ids(model))))
    model.generation_config.pad_token_id = text.tokenizer.pad_token_id
    model.generation_config._from_model_config = False  # transformers 4 would derive it again from config.json


def write_extra_files(draft: Path, run: "ExportRun", text: "TextSide", *, writes_words: bool) -> Path | None:
    """The value head of a reward model, the GGUF file if asked for, and the Modelfile for Ollama.

    A chat format that is a program cannot stand in a Modelfile. Returns the GGUF file.
    """
    from luthier.data.chat.modelfile import modelfile

    gguf = None
    adapters = [fetched(name) for name in reversed(run.model.adapter_name_or_path)]
    inner = [str(Path(name, run.model.adapter_folder or "")) for name in adapters]
    copy_value_head((*inner, fetched(run.model.model_name_or_path)), draft)
    if (number_format := run.export.export_gguf) is not None:
        from luthier.model.files.gguf.writer import gguf_name, write_gguf

        gguf = draft / gguf_name(number_format)
        write_gguf(draft, gguf, number_format, trust_remote_code=run.model.trust_remote_code)
    if text.template.kind != "program" and writes_words:
        own = {"bos_token": text.tokenizer.bos_token, "eos_token": text.tokenizer.eos_token}
        source = f"./{gguf.name}" if gguf else "."
        try:
            (draft / "Modelfile").write_text(modelfile(text.template, source=source, **own), encoding="utf-8")
        except InvalidInput as fault:
            warn(f"no Modelfile for Ollama: {fault}")
    return gguf


def check_export(
    draft: Path,
    gguf: Path | None,
    run: "ExportRun",
    source: ModelSource,
    reference: "Reference | None",
    *,
    dtype: "torch.dtype",
    attn_implementation: str,
) -> dict[str, Any]:
    """The merge check of the folder and of the GGUF file, as saved in merge_check.json; empty if not asked for.

    `source`: of the model that was exported.
    """
    from luthier.model.adapters._merge_check import allowed_mean_kl
    from luthier.workflow.merge_check import FILE_NAME, check_written

    if reference is None:
        return {}
    own, formats = run.export.export_max_kl, [str(dtype).removeprefix("torch.")]
    allowed: float | None = allowed_mean_kl(*formats) if own is None else own
    if run.export.export_quantization_bit is not None:
        allowed = own  # how much low-bit weights may cost is for the user to decide
    how: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    how["device_map"] = "auto" if run.export.export_device == "auto" else None
    facts = check_written(replace(source, name=str(draft)), reference, allowed_mean_kl=allowed, **how)
    if reference.merges:
        facts["adapters_before_the_last"] = [asdict(merge) for merge in reference.merges]
    if gguf is not None:
        allowed = allowed_mean_kl(*formats, str(run.export.export_gguf)) if own is None else own
        facts["gguf"] = check_written(replace(source, name=str(gguf)), reference, allowed_mean_kl=allowed, **how)
    write_atomically(draft / FILE_NAME, json.dumps(facts, indent=2) + "\n")
    return facts


def check_target(target: Path, model: str, adapters: Sequence[str], *, key: str = "export_dir") -> None:
    """Nothing that exists may be written over. Raises `OutputError`. `key`: who names the folder."""
    require_unused(target, model, adapters, key=key)
    require_writable(key, target)


def require_unused(target: Path, model: str, adapters: Sequence[str], *, key: str = "export_dir") -> None:
    """As `check_target`, but writes nothing to find out whether that can be done."""
    require_apart(key, target, (model, *adapters))
    weights = sorted(file.name for pattern in WEIGHT_PATTERNS for file in target.glob(pattern))
    if weights:
        raise OutputError(
            f"{key}: {target}: holds weights already ({', '.join(weights[:3])}{', ...' * (len(weights) > 3)})"
            " -> name a new folder, or remove this one if nobody needs it"
        )


def check_mergeable(run: "ExportRun", source: ModelSource) -> None:
    """Adapters cannot be merged into weights that a quantizer packed. Raises `ModelError`."""
    from luthier.model.loading.config import load_config
    from luthier.model.quantization._prequantized import prequantized_format_of

    keys = run.model
    if not keys.adapter_name_or_path:
        return
    config = load_config(source)
    found = prequantized_format_of(config)
    if found is not None and not found[1].unpacks:
        raise ModelError(
            f"model_name_or_path: {keys.model_name_or_path}: its weights are quantized ({found[0]}), so adapters cannot"
            " be merged into them -> give the model that it was quantized from, or use model and adapter side by side"
        )


def check_quantizable(run: "ExportRun", source: ModelSource) -> None:
    """Raises `MissingExtra` without the library, `ModelError` for weights that are quantized already."""
    from luthier.model.loading.config import load_config
    from luthier.model.quantization._prequantized import prequantized_format_of

    keys = run.model
    if run.export.export_quantization_bit is None:
        return
    for module in GPTQ_LIBRARIES:
        if not is_installed(module):
            raise missing_extra(module, "gptq", "export_quantization_bit")
    found = prequantized_format_of(load_config(source))
    if found is not None and not found[1].unpacks:
        raise ModelError(
            f"model_name_or_path: {keys.model_name_or_path}: its weights are quantized already ({found[1].words})"
            " -> give the model that it was quantized from, or leave export_quantization_bit out"
        )


def check_gguf(run: "ExportRun", source: ModelSource) -> None:
    """Raises `ModelError` for a model that GGUF has no layout for."""
    from luthier.model.files.gguf.writer import check_writable
    from luthier.model.loading.config import load_config

    if run.export.export_gguf is not None:
        check_writable(load_config(source))


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
    from huggingface_hub.errors import HTTPError  # also of a connection that fails

    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by luthier export")
    except (OSError, ValueError, HTTPError) as fault:
        raise RunFailed(
            f"export_hub_model_id: {repository}: the upload failed ({fault}); the export itself is whole, in {folder}"
        ) from fault
    info(f"uploaded to {repository}")
