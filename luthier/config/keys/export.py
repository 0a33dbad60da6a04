"""The keys of `luthier export`."""

from dataclasses import dataclass
from typing import Literal

from luthier.config.keys.fields import no_effect


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
