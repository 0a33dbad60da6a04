"""The check at the end of an export: the written model is reloaded and compared with the base and its adapters."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import RowError, RunFailed
from luthier.core.log import info
from luthier.inspection.sample_dialogues import SAMPLES
from luthier.model.adapters._merge_check import Reference

if TYPE_CHECKING:
    import torch

    from luthier.data.rows.encoding import Encoding
    from luthier.model.files.sources import ModelSource

FILE_NAME = "merge_check.json"
PLAIN_TEXTS = (
    "The capital of France is Paris, and its river is the Seine. Once a year people from all over the world come to",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))",
)
_MAX_PROMPT_TOKENS, _MAX_TOKENS = 64, 256
"""The logits of all prompts are kept: 256 positions and 150,000 tokens are 150 MB."""


def sample_prompts(encoding: "Encoding") -> list[list[int]]:
    """Plain texts, and the sample dialogues that the run's chat format can write."""
    prompts = [encoding.encoder.text(text)[:_MAX_PROMPT_TOKENS] for text in PLAIN_TEXTS]
    for sample in SAMPLES:
        try:
            rows = encoding.unlimited().rows(sample.dialogue, keep_past_thinking=True)
        except RowError:
            continue
        ids = [index for prompt, answer in rows[-1] for index in (*prompt, *answer)][:_MAX_PROMPT_TOKENS]
        if len(ids) > 1 and sum(map(len, prompts)) + len(ids) <= _MAX_TOKENS:
            prompts.append(ids)
    return prompts


def check_written(
    written: "ModelSource",
    reference: Reference,
    *,
    dtype: "torch.dtype",
    attn_implementation: str,
    device_map: str | None,
    allowed_mean_kl: float | None,
) -> dict[str, Any]:
    """Load `written`, a folder or a GGUF file, and compare. Returns the content of merge_check.json.

    Raises `RunFailed` if the mean KL divergence is above `allowed_mean_kl`, in nats; None allows any value.
    """
    from luthier.model.loading.load import load_model

    model = load_model(written, dtype=dtype, attn_implementation=attn_implementation, device_map=device_map)
    found = reference.compare(model)
    del model
    path = Path(written.name)
    name = f" of {path.name}" if path.is_file() else ""
    limit = float("inf") if allowed_mean_kl is None else allowed_mean_kl
    info(f"merge check{name}: {found}" + (f" (allowed: {limit:g} nats)" if allowed_mean_kl is not None else ""))
    worst = max((found, *reference.merges), key=lambda one: one.mean_kl)
    if not worst.mean_kl <= limit:  # also true for NaN
        raise RunFailed(
            f"merge check{name}: the export differs from base and adapters ({worst}; the limit is {limit:g} nats),"
            " so it is not kept -> set infer_dtype: float32 if rounding may be the cause, or raise export_max_kl if"
            " this is good enough"
        )
    return {**asdict(found), "allowed_mean_kl": allowed_mean_kl, "dtype": str(dtype).removeprefix("torch.")}
