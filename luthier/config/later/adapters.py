"""Keys of block expansion, which is to come."""

from dataclasses import dataclass

from luthier.config.fields import refused


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaProConfig:
    use_llama_pro: bool = refused(
        False,
        "training inserted blocks (LLaMA Pro) is not part of this version",
        "leave it out; freeze trains existing layers",
    )
    """Train only the blocks that an expansion inserted into the model (https://arxiv.org/abs/2401.02415)."""
