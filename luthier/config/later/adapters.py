"""Keys of the adapter methods to come: `finetuning_type: oft`, and block expansion."""

from dataclasses import dataclass

from luthier.config.fields import refused


@dataclass(frozen=True, slots=True, kw_only=True)
class OftConfig:
    additional_target: tuple[str, ...] = ()
    """Modules trained in full beside the adapter and saved with it."""
    module_dropout: float = 0.0
    """Share of the adapted modules left out at random while training."""
    oft_rank: int = 0
    """Number of blocks of the rotation; 0 derives it from the block size."""
    oft_block_size: int = 32
    """Side of a block of the rotation."""
    oft_target: tuple[str, ...] = ("all",)
    """Names of the modules that get a rotation, or `all`."""
    create_new_adapter: bool = False
    """Merge the adapters given by `adapter_name_or_path` and train a fresh one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaProConfig:
    use_llama_pro: bool = refused(
        False,
        "training inserted blocks (LLaMA Pro) is not part of this version",
        "leave it out; freeze trains existing layers",
    )
    """Train only the blocks that an expansion inserted into the model (https://arxiv.org/abs/2401.02415)."""
