"""transformers 5.23 reads the header of a GGUF file again for the tokenizer, for each look at the config and for the
weights (3 s each for 49,000 tokens), and builds the table of tensor names once per sub-module (6 s for 30 layers).

https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/modeling_gguf_pytorch_utils.py
`get_gguf_hf_weights_map` calls itself for each child module. Inside `fast_gguf` both are made once and kept, and lists
are read at once. transformers' own reader, of tokenizers, takes each text from a memmap, whose slices take 5 us.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFReader


@lru_cache(maxsize=1)
def _read(path: str, modified_ns: int) -> "GGUFReader":
    from luthier.model.compat.gguf_reader import QuickReader

    return QuickReader(path)


def read_header(path: "os.PathLike[str] | str") -> "GGUFReader":
    return _read(os.fspath(path), os.stat(path).st_mtime_ns)


def forget() -> None:
    """Free the header, some 60 MB for 49,000 tokens, once the weights are loaded."""
    _read.cache_clear()


@contextmanager
def fast_gguf() -> Iterator[None]:
    """While open, transformers meets one reader per file and one table of names per architecture."""
    import gguf
    import numpy
    from transformers import modeling_gguf_pytorch_utils
    from transformers.integrations.gguf import reader

    from luthier.model.compat.gguf_reader import parsed

    module: Any = gguf
    utils: Any = modeling_gguf_pytorch_utils
    own: Any = reader
    mapped = own._mapped
    kept = module.GGUFReader, module.get_tensor_name_map, utils._gguf_parse_value
    module.GGUFReader, module.get_tensor_name_map = read_header, lru_cache(maxsize=1)(gguf.get_tensor_name_map)
    utils._gguf_parse_value = parsed
    own._mapped = lambda path: mapped(path).view(numpy.ndarray)
    try:
        yield
    finally:
        module.GGUFReader, module.get_tensor_name_map, utils._gguf_parse_value = kept
        own._mapped = mapped
