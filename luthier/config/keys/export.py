"""The keys of `luthier export`, and what does not go together with them."""

from dataclasses import dataclass
from typing import Any, Literal

from luthier.config.keys.fields import no_effect
from luthier.config.rules.engine import Rule, Rules, at_least

GPTQ_BITS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    export_dir: str | None = None
    """Folder that the merged model is written to."""
    export_size: int = 5
    """Largest weight file, in GB."""
    export_device: Literal["cpu", "auto"] = "cpu"
    """Where the adapters are merged."""
    export_quantization_bit: int | None = None
    """Quantize the export to 2, 3, 4 or 8 bits by GPTQ (https://arxiv.org/abs/2210.17323)."""
    export_quantization_dataset: str | None = None
    """Texts that GPTQ measures the model on: a file with a column `text`, or a dataset of the hub."""
    export_quantization_nsamples: int = 128
    """Number of pieces of text that GPTQ is given."""
    export_quantization_maxlen: int = 1024
    """Length of each piece, in tokens."""
    export_legacy_format: bool = no_effect(False, "transformers 5 writes safetensors files only")
    """Write `.bin` files."""
    export_hub_model_id: str | None = None
    """Name on the Hugging Face hub to upload the export to."""
    export_gguf: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    """Also write one GGUF file, in this number format, for llama.cpp and Ollama."""
    export_check: bool = True
    """Load the export again and compare its answers with those of base and adapters before merging."""
    export_max_kl: float | None = None
    """Largest mean KL divergence, in nats, that this check allows; by number format if not given."""


def _quantizes(run: Any) -> bool:
    return run.export.export_quantization_bit is not None


EXPORT_RULES = Rules(
    (
        Rule(("export_dir",), "is missing", "say which folder to write to", lambda run: not run.export.export_dir),
        at_least("export", "export_size", 1),
        at_least("export", "export_max_kl", 0),
        Rule(
            ("export_max_kl", "export_check"),
            "is not read, since the check is switched off",
            "leave it out, or set export_check: true",
            lambda run: run.export.export_max_kl is not None and not run.export.export_check,
            only_warns=True,
        ),
        Rule(
            ("export_quantization_bit",),
            "GPTQ has layouts for 2, 3, 4 and 8 bits",
            "give one of these",
            lambda run: _quantizes(run) and run.export.export_quantization_bit not in GPTQ_BITS,
        ),
        Rule(
            ("export_quantization_bit", "export_quantization_dataset"),
            "the weights are rounded so that outputs on real texts stay close, and no texts are named",
            "give export_quantization_dataset: a file of texts, or a dataset of the hub",
            lambda run: _quantizes(run) and not run.export.export_quantization_dataset,
        ),
        Rule(
            ("export_quantization_bit", "adapter_name_or_path"),
            "an export merges adapters or quantizes the model, one at a time",
            "export the merged model first, then quantize its folder",
            lambda run: _quantizes(run) and bool(run.model.adapter_name_or_path),
        ),
        Rule(
            ("export_gguf", "export_quantization_bit"),
            "a GGUF file is written from plain weights, and these are quantized to GPTQ",
            "leave one of the two out; two exports give both",
            lambda run: _quantizes(run) and run.export.export_gguf is not None,
        ),
        at_least("export", "export_quantization_nsamples", 1),
        at_least("export", "export_quantization_maxlen", 1),
        *(
            Rule(
                (key, "export_quantization_bit"),
                "is read only if export_quantization_bit is given",
                "give it, or leave this out",
                lambda run, key=key: key in run.changed and not _quantizes(run),  # type: ignore[misc]
                only_warns=True,
            )
            for key in ("export_quantization_dataset", "export_quantization_nsamples", "export_quantization_maxlen")
        ),
    )
)
