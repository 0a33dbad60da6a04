"""transformers 5.24 spells every token of a byte-level GGUF vocabulary in the byte alphabet, added ones too, and so
loses those with other characters, such as `<｜User｜>` or one with a blank. And it gives `<|endoftext|>` to a
vocabulary without it, by an id that the model has no row for: such a text of a user would end the engine.

Of a SentencePiece vocabulary it reads no `tokenizer.ggml.add_space_prefix`, and puts a blank before the first text
alone. llama.cpp puts one before the first text and before the text behind each added token, also if the text begins
with a blank, unless the key is false. So do tokenizers with a `Prepend` normalizer, such as that of Llama 2. A file
that luthier wrote may say that its tokenizer does otherwise (`PREPENDS`).

https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/integrations/gguf/gguf_tokenizer_mapping.py
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp (LLAMA_VOCAB_TYPE_SPM)
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from luthier.model.compat.gguf_speed import read_header

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE = "\u2581"
PREPENDS = "luthier.prepends_blank"
"""A key of ours in GGUF files: when a `Metaspace` puts a blank before a text. Other programs read `add_space_prefix`
alone, which tells less."""
SCHEMES = ("first", "always")
"""Before the first text; before the text behind each added token as well. A text that begins with a blank gets none."""
_ADDED = {3: True, 4: False}
"""Kind of token (control, user-defined) -> whether it is special. The text of both is found before any other."""


def restore_blanks(tokenizer: "PreTrainedTokenizerBase", file: Path) -> None:
    """Let the tokenizer of a SentencePiece vocabulary, in place, put blanks before texts as the file says."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    backend = cast(Any, tokenizer).backend_tokenizer
    is_metaspace = isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace)
    if not is_metaspace or _value(file, "tokenizer.ggml.model", "") != "llama":
        return
    adds, scheme = _value(file, "tokenizer.ggml.add_space_prefix", True), _value(file, PREPENDS, None)
    if adds and scheme in SCHEMES:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        return
    marks = normalizers.Replace(" ", SPACE)
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), marks]) if adds else marks
    if not adds:
        blanks = decoders.Replace(SPACE, " ")
        backend.decoder = decoders.Sequence([blanks, decoders.ByteFallback(), decoders.Fuse()])


def restore_tokens(tokenizer: "PreTrainedTokenizerBase", file: Path) -> None:
    """Give a tokenizer that transformers made of a GGUF file the added tokens of that file, and no others, in place."""
    tokens, kinds, model = (_values(file, f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "model"))
    # SentencePiece has no such alphabet, and blanks are spelled on purpose there.
    kinds = kinds if "".join(model) == "gpt2" else []
    listed = {index: (tokens[index], _ADDED[kind]) for index, kind in enumerate(kinds) if kind in _ADDED}
    known = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
    lost = {index: own for index, own in listed.items() if known.get(index) != own[0]}
    if not tokens or not (lost or any(index >= len(tokens) for index in known)):
        return
    from tokenizers import Tokenizer

    backend: Any = tokenizer
    parts = json.loads(backend.backend_tokenizer.to_str())
    _restore(parts, lost, len(tokens))
    restored = Tokenizer.from_str(json.dumps(parts))
    restored.encode_special_tokens = backend.backend_tokenizer.encode_special_tokens
    backend._tokenizer = restored
    backend.update_post_processor()


def _restore(parts: dict[str, Any], lost: dict[int, tuple[str, bool]], num_tokens: int) -> None:
    """Change what a tokenizer is made of. `lost`: id -> (text, whether it is special)."""
    vocabulary = parts["model"]["vocab"]
    if isinstance(vocabulary, dict):
        spelled = {index: token for token, index in vocabulary.items() if index in lost}
        for index, (text, _) in lost.items():
            vocabulary.pop(spelled.get(index), None)
            vocabulary[text] = index
    kept = [one for one in parts["added_tokens"] if one["id"] < num_tokens and one["id"] not in lost]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    kept += [{"id": index, "content": text, "special": special, **flags} for index, (text, special) in lost.items()]
    parts["added_tokens"] = sorted(kept, key=lambda one: one["id"])
    parts["post_processor"] = None  # made again, since it may hold ids that have changed


def _value(file: Path, name: str, default: Any) -> Any:
    field = read_header(file).get_field(name)
    return default if field is None else field.contents()


def _values(file: Path, name: str) -> list[Any]:
    field = read_header(file).get_field(name)
    return [] if field is None else list(field.contents())  # of a text, its letters
