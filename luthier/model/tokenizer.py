"""The tokenizer: loaded from the files of the model, then fitted to the chat format.

After fitting it has an end token and a padding token, one token that ends an answer in the chat format, and the tokens
that the user adds.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError
from luthier.model.compat.gguf_tokens import restore_blanks, restore_tokens
from luthier.model.files.gguf.header import check_loadable
from luthier.model.files.readable import readable
from luthier.model.files.sources import ModelFiles, ModelSource, check_hub, check_tokenizer_files, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class FittedTokenizer:
    tokenizer: "PreTrainedTokenizerBase"
    added_tokens: tuple[str, ...] = ()
    """Tokens that the model has never seen, in the order of their ids."""
    descriptions: Mapping[str, str] = field(default_factory=dict)
    """Added token -> what it means (`new_special_tokens_config`)."""
    stop_token_ids: tuple[int, ...] = ()
    """Generation stops at any of these; the end token comes first."""
    notes: tuple[str, ...] = ()
    """What was changed, for the log and the report."""
    warnings: tuple[str, ...] = ()
    """What was changed and may surprise."""


TOKENIZER_CONFIG = "tokenizer_config.json"
DEFAULT_EOS = "<|endoftext|>"
"""The end token of a tokenizer that has none, unless the chat format ends answers with another token it knows."""


def load_tokenizer(
    source: ModelSource, *, use_fast: bool = True, split_special_tokens: bool = False
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model, or of the folder of an adapter; it pads on the right.

    transformers 5 has one kind of tokenizer, so `use_fast` matters for remote code only.
    Raises `ModelError` where there is none.
    """
    from transformers import AutoTokenizer

    folder = Path(source.name).expanduser()
    has_own_files = (folder / TOKENIZER_CONFIG).is_file()
    files = ModelFiles(str(folder)) if has_own_files else source.files
    if files.gguf_file:
        check_loadable(Path(files.name) / files.gguf_file)
    elif files.is_local:
        check_tokenizer_files(Path(files.name))
    else:
        check_hub(files.name, source.access)
    options: dict[str, Any] = {"gguf_file": files.gguf_file} if files.gguf_file else {}
    if not files.gguf_file:
        options["config"] = _kind_of_model(Path(files.name) if files.is_local else source.folder, files.name)
    with readable(files, "tokenizer"), _apart(files) as place:
        tokenizer = AutoTokenizer.from_pretrained(
            place,
            use_fast=use_fast,
            split_special_tokens=split_special_tokens,
            padding_side="right",
            **source.options,
            **options,
        )
        if files.gguf_file:
            tokenizer.name_or_path = files.name
            file = Path(files.name) / files.gguf_file
            restore_tokens(tokenizer, file)
            restore_blanks(tokenizer, file)
    return tokenizer


@contextmanager
def _apart(files: ModelFiles) -> Iterator[str]:
    """The folder to read the tokenizer from. Where other files lie beside a GGUF file, as in an export, transformers
    would take its end token and its chat template from these, and find none."""
    if files.gguf_file is None:
        yield files.name
        return
    with TemporaryDirectory(prefix="luthier-gguf-") as folder:
        Path(folder, files.gguf_file).symlink_to(Path(files.name, files.gguf_file).expanduser().resolve())
        yield folder


def _kind_of_model(folder: Path, name: str) -> "PreTrainedConfig | None":
    """The type of the model, by which transformers chooses the class of a tokenizer; None if it must read more.

    It would load the whole config, and the config of a model imports torch and the code that loads weights (2 s).
    """
    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if not all((folder / name).is_file() for name in ("config.json", TOKENIZER_CONFIG)):
        return None
    config, own = read_json(folder / "config.json"), read_json(folder / TOKENIZER_CONFIG)
    # The config of a type that shares its class with another one says that it is of that other type.
    classes = list(CONFIG_MAPPING_NAMES.values())
    is_own_type = classes.count(CONFIG_MAPPING_NAMES.get(str(config.get("model_type")), "")) == 1
    if not is_own_type or not isinstance(own.get("tokenizer_class"), str) or "auto_map" in {*config, *own}:
        return None
    asked: dict[str, Any] = {name: config[name] for name in ("model_type", "model_name") if name in config}
    asked["name_or_path"] = name
    return PreTrainedConfig(**asked)


def fit_tokenizer(
    tokenizer: "PreTrainedTokenizerBase",
    *,
    stop_words: Iterable[str] = (),
    replace_eos: bool = False,
    add_tokens: Iterable[str] = (),
    add_special_tokens: Iterable[str] = (),
    new_special_tokens: Mapping[str, str] | None = None,
    vocab_size: int | None = None,
    min_length_tokens: int | None = None,
) -> FittedTokenizer:
    """Fit `tokenizer`, in place, to a chat format and to the tokens that the user adds.

    `stop_words`, `replace_eos`: of the chat format; with `replace_eos` the first stop word becomes the end token.
    `new_special_tokens`: token -> description; takes the place of `add_special_tokens`.
    `vocab_size`: rows of the model's embedding if it is not to grow (no `resize_vocab`), else None.
    `min_length_tokens`: raise `model_max_length` to this, so that long rows cause no warning.
    Raises `ModelError` for an end token without room in the embedding.
    """
    notes: list[str] = []
    warnings: list[str] = []
    size_before = len(tokenizer)
    specials = list(new_special_tokens or add_special_tokens)
    tokenizer.add_tokens(list(add_tokens))
    if specials:
        _add_specials(tokenizer, specials)
    stops = list(stop_words)
    if replace_eos and stops:
        _set_eos(tokenizer, stops[0], vocab_size)
        notes.append(f"the end token is {stops[0]!r}, as the chat format says")
    elif tokenizer.eos_token is None:
        (warnings if _give_eos(tokenizer, stops, vocab_size) else notes).append(
            f"the tokenizer has no end token (eos): {tokenizer.eos_token!r} becomes it"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        notes.append(f"the tokenizer has no padding token: the end token {tokenizer.eos_token!r} serves as one")
    others = stops[1:] if replace_eos else stops
    known = tokenizer.get_vocab() if others else {}  # slow for large ones
    for word in others:
        if word in known or vocab_size is None or len(tokenizer) < vocab_size:
            _add_specials(tokenizer, [word])
        else:
            warnings.append(
                f"the stop word {word!r} is not a token of this model and is left out -> resize_vocab: true adds it"
            )
    longest = tokenizer.model_max_length
    if not isinstance(longest, int | float):
        raise ModelError(f"{TOKENIZER_CONFIG}: model_max_length: {longest!r}: must be a number -> correct it")
    if min_length_tokens is not None and longest < min_length_tokens:
        tokenizer.model_max_length = min_length_tokens
    added = tuple(tokenizer.convert_ids_to_tokens(list(range(size_before, len(tokenizer)))))
    if added:
        notes.append(f"{len(added)} tokens added: {', '.join(map(repr, added[:8]))}{', ...' if len(added) > 8 else ''}")
    stop_ids = stop_token_ids(tokenizer, stops)
    return FittedTokenizer(tokenizer, added, dict(new_special_tokens or {}), stop_ids, tuple(notes), tuple(warnings))


def _add_specials(tokenizer: "PreTrainedTokenizerBase", tokens: list[str]) -> None:
    tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)


def _give_eos(tokenizer: "PreTrainedTokenizerBase", stop_words: Sequence[str], vocab_size: int | None) -> bool:
    """Gives an end token to a tokenizer without one. Returns whether the model has never seen it."""
    known = tokenizer.get_vocab()
    token = next((word for word in (DEFAULT_EOS, *stop_words) if word in known), None)
    if token is None and vocab_size is not None and len(tokenizer) >= vocab_size:
        raise ModelError(
            f"the tokenizer has no end token (eos_token), so no answer would end, and the embedding of {vocab_size:,}"
            f" rows has no room for {DEFAULT_EOS!r} -> name the end token of the model as eos_token in its"
            " tokenizer_config.json, choose a template whose stop word the model knows, or set resize_vocab: true"
        )
    tokenizer.add_special_tokens({"eos_token": token or DEFAULT_EOS})
    return token is None


def _set_eos(tokenizer: "PreTrainedTokenizerBase", token: str, vocab_size: int | None) -> None:
    if token not in tokenizer.get_vocab() and vocab_size is not None and len(tokenizer) >= vocab_size:
        raise ModelError(
            f"the chat format ends an answer with {token!r}, which is not a token of this model, and its embedding of "
            f"{vocab_size:,} rows has no room for it -> set resize_vocab: true, or choose another template"
        )
    tokenizer.add_special_tokens({"eos_token": token})


def stop_token_ids(tokenizer: "PreTrainedTokenizerBase", stop_words: Iterable[str] = ()) -> tuple[int, ...]:
    """The end token and those stop words that are one token each."""
    words = tuple(stop_words)
    known = tokenizer.get_vocab() if words else {}
    ids = [tokenizer.eos_token_id, *(known[word] for word in words if word in known)]
    return tuple(dict.fromkeys(index for index in ids if index is not None))


def special_texts(tokenizer: "PreTrainedTokenizerBase") -> frozenset[str]:
    """The texts of tokens that `skip_special_tokens` leaves out."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return frozenset({*map(str, tokenizer.all_special_tokens), *added})


def special_pattern(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches these texts of special tokens, so that a text can be shown as `skip_special_tokens` leaves it."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def name_ends(model: "PreTrainedModel", stop_ids: Iterable[int]) -> None:
    """Add the ends of an answer to those that the generation settings of the model name, so that they are saved."""
    if not model.can_generate():
        return
    generation = model.generation_config
    named = generation.eos_token_id
    own = [] if named is None else [named] if isinstance(named, int) else list(named)
    ends = list(dict.fromkeys((*stop_ids, *own)))
    if set(ends) != set(own):
        generation.eos_token_id = ends
        generation._from_model_config = False  # or transformers would derive it again from config.json


def read_new_special_tokens(path: Path) -> dict[str, str]:
    """`new_special_tokens_config`: a YAML file of token -> description. Raises `ModelError`."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as fault:
        raise ModelError(f"new_special_tokens_config: there is no file {path}") from fault
    except OSError as fault:
        raise ModelError(f"new_special_tokens_config: {path}: cannot be read ({fault.strerror})") from fault
    except (yaml.YAMLError, UnicodeDecodeError) as fault:
        raise ModelError(f"{path}: this is not valid YAML ({fault})") from fault
    if not isinstance(content, dict) or not all(isinstance(text, str) for pair in content.items() for text in pair):
        raise ModelError(f"{path}: this must map each new token to its description, e.g. '<think>: start of a thought'")
    return content
