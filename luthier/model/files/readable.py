"""What transformers raises for files it cannot use, said in words that help."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pickle import UnpicklingError

from luthier.core.errors import LuthierError, ModelError
from luthier.model.compat.gguf_speed import fast_gguf
from luthier.model.files.hubs import not_fetched
from luthier.model.files.sources import ModelFiles

UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    ImportError,
    RuntimeError,
    EOFError,
    UnpicklingError,
)
"""What libraries raise for files with values that they do not expect, such as `"dtype": "x"` or `"head_dim": 0`."""


@contextmanager
def readable(source: ModelFiles, part: str) -> Iterator[None]:
    """Around a call that reads a `part` (config, tokenizer, weights) of a model: failures become `ModelError`."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        with fast_gguf() if source.gguf_file else nullcontext():
            yield
    except LuthierError:  # which says already what to do
        raise
    except (*UNREADABLE, SafetensorError, StrictDataclassError) as fault:
        raise _unusable(source, part, fault) from fault


def first_line(fault: BaseException) -> str:
    """What a library says, or the name of its error if it says nothing."""
    return next((line.strip() for line in str(fault).splitlines() if line.strip()), type(fault).__name__)


_CAUSES = (
    (
        "does not recognize this architecture",
        None,
        "update transformers: pip install -U transformers",
    ),
    (
        "contains custom code",
        "the model comes with Python code of its own, which is run only if asked for",
        "read that code, and set trust_remote_code: true if you trust it",
    ),
    (
        "ignore_mismatched_sizes",
        "they have other shapes than config.json says; the table above names them",
        "config.json and weights belong to different models: copy or download both again",
    ),
    *(
        (words, None, "take a smaller model or quantization_bit: 4, or free some memory")
        for words in ("out of memory", "can't allocate memory")
    ),
    (
        "AMX SFT backend not available",
        "use_kt: kt-kernel has no kernels that train for the processor of this machine",
        "take a machine whose processor has AMX or AVX-512, or leave use_kt out",
    ),
    (
        "Unrecognized configuration class",
        "transformers has no language model of this type",
        "name a model that generates text",
    ),
)
"""Words of transformers, what they mean (None: they say it), and what to do."""


def _unusable(source: ModelFiles, part: str, fault: BaseException) -> ModelError:
    lines = str(fault).split("\n") if str(fault).strip() else [type(fault).__name__]
    reason = " ".join(line.strip() for line in (lines if lines[0].rstrip().endswith(":") else lines[:1]))
    if not source.is_local:
        return not_fetched(str(source), part, reason)
    remedy = "make sure that the folder is complete; copy or download it again"
    for words, meaning, what_to_do in _CAUSES:
        if words in str(fault):
            reason, remedy = meaning or reason.partition(" This could be")[0], what_to_do
    return ModelError(f"{source}: its {part} cannot be loaded ({reason}) -> {remedy}")
