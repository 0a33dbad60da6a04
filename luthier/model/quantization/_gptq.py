"""GPTQ through the library gptqmodel: weights of 2, 3, 4 or 8 bits, rounded so that what layers compute stays close.

Frantar et al., https://arxiv.org/abs/2210.17323: with X, the inputs of a layer on calibration texts, the rounded
weights W' are to minimize || W X - W' X ||^2 (equation 1). Columns are rounded one after the other, and the error of
each is compensated in those that are not rounded yet, by the inverse of the Hessian 2 X X^T (equations 2 and 3).
"""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError, RunFailed
from luthier.core.log import info
from luthier.core.machine import num_cpus
from luthier.core.versions import require
from luthier.model.classes import require_dense
from luthier.model.modules import expert_parameters, linear_layers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

GROUP_SIZES = (128, 64, 32)
"""Weights of a row that share a scale: the first that divides the width of every layer."""


def group_size_for(model: "PreTrainedModel") -> int:
    """Raises `ModelError` for a model whose weights do not go into whole groups."""
    require_dense(model.config, "export_quantization_bit")
    head = model.get_output_embeddings()
    layers: list[Any] = [layer for _, layer in linear_layers(model) if layer is not head]
    # Layers that keep their weight as (in, out) have no such attribute.
    widths = {vars(layer).get("in_features", layer.weight.shape[0]) for layer in layers}
    widths |= {side for name in expert_parameters(model) for side in model.get_parameter(name).shape[1:]}
    for size in GROUP_SIZES:
        if not any(width % size for width in widths):
            if size != GROUP_SIZES[0]:
                info(f"GPTQ: groups of {size} weights, since {GROUP_SIZES[0]} do not divide the width of every layer")
            return size
    raise ModelError(
        f"export_quantization_bit: layers of this model are {', '.join(map(str, sorted(widths)))} wide, which are no"
        f" multiples of {GROUP_SIZES[-1]}, so GPTQ has no layout for them -> leave export_quantization_bit out"
    )


def quantize_folder(
    folder: Path,
    target: Path,
    samples: Sequence[Sequence[int]],
    *,
    bits: int,
    group_size: int,
    max_shard_size: str,
    dtype: "torch.dtype",
    on_cpu: bool,
    trust_remote_code: bool = False,
) -> None:
    """The model saved in `folder`, quantized, into `target`: weights, config.json and quantize_config.json.

    `dtype`: of what is not quantized. Raises `MissingExtra` without the library, `RunFailed` for a model that it cannot
    quantize.
    """
    # With a single worker, which it takes on two cores, a task that waits for another one would wait forever.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, num_cpus() // 2)))
    library = require("gptqmodel", "gptq", "export_quantization_bit")
    rows = [{"input_ids": list(ids), "attention_mask": [1] * len(ids)} for ids in samples]
    how = {"trust_remote_code": trust_remote_code, "dtype": dtype, **({"device": "cpu"} if on_cpu else {})}
    source, target = folder.resolve(), target.resolve()
    # It writes logs into the working folder, and tables to where a command prints its result.
    with (
        tempfile.TemporaryDirectory() as scratch,
        contextlib.chdir(scratch),
        contextlib.redirect_stdout(sys.stderr),
    ):
        try:
            settings = library.QuantizeConfig(bits=bits, group_size=group_size, offload_to_disk_path=scratch)
            model = library.GPTQModel.load(str(source), settings, **how)
            model.quantize(rows, batch_size=1, calibration_data_min_length=1)
            model.save(str(target), max_shard_size=max_shard_size)
        except (TypeError, ValueError, RuntimeError) as fault:  # an architecture it does not know, a layer too narrow
            reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
            raise RunFailed(f"export_quantization_bit: gptqmodel cannot quantize this model ({reason})") from fault
    _forget_scratch(target)


def _forget_scratch(target: Path) -> None:
    """The library notes where it put things while it worked; two equal exports would not be equal."""
    for name in ("config.json", "quantize_config.json"):
        file = target / name
        content = json.loads(file.read_text("utf-8"))
        content.get("quantization_config", content)["meta"].pop("offload_to_disk_path", None)
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
