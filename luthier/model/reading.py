"""What transformers raises for files it cannot use, said in words that help."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from luthier.core.errors import ModelError
from luthier.model.compat.gguf_speed import fast_gguf
from luthier.model.sources import Source


@contextmanager
def readable(source: Source, part: str) -> Iterator[None]:
    """Around a call that reads a `part` (config, tokenizer, weights) of a model: failures become `ModelError`."""
    from safetensors import SafetensorError

    try:
        with fast_gguf() if source.gguf_file else nullcontext():
            yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as fault:
        raise _unusable(source, part, fault) from fault


def _unusable(source: Source, part: str, fault: BaseException) -> ModelError:
    lines = str(fault).split("\n") if str(fault).strip() else [type(fault).__name__]
    reason = " ".join(line.strip() for line in (lines if lines[0].rstrip().endswith(":") else lines[:1]))
    if source.is_local and "does not recognize this architecture" in reason:
        reason = reason.partition(" This could be")[0]
        return ModelError(
            f"{source}: its {part} cannot be loaded ({reason}) -> update transformers: pip install -U transformers"
        )
    if source.is_local:
        remedy = "make sure that the folder is complete; copy or download it again"
        return ModelError(f"{source}: its {part} cannot be loaded ({reason}) -> {remedy}")
    return ModelError(
        f"{source}: there is no folder of this name here, and its {part} cannot be had from the hub ({reason}) -> give "
        "the path of a folder or a .gguf file, or check the name, the network and hf_hub_token"
    )
