"""The keys of `luthier export`."""

from dataclasses import dataclass
from typing import Literal

from luthier.config.fields import no_effect, refused

_WITHOUT_BITS = "read together with export_quantization_bit only, which is not part of this version"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    export_dir: str | None = None
    """Folder that the merged model is written to."""
    export_size: int = 5
    """Largest weight file, in GB."""
    export_device: Literal["cpu", "auto"] = "cpu"
    """Where the adapters are merged."""
    export_quantization_bit: int | None = refused(
        None, "quantising an export (GPTQ) is not part of this version", "leave it out and quantise the exported folder"
    )
    """Bits of a GPTQ export."""
    export_quantization_dataset: str | None = no_effect(None, _WITHOUT_BITS)
    """Texts that a GPTQ export measures the model on."""
    export_quantization_nsamples: int = no_effect(128, _WITHOUT_BITS)
    """Number of those texts."""
    export_quantization_maxlen: int = no_effect(1024, _WITHOUT_BITS)
    """Length of those texts, in tokens."""
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
