"""The text side of a run: tokenizer fitted to the chat format, and the two together as an `Encoding`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.config.keys.data import holds_tokenized_rows
from luthier.config.keys.processor import given_limits
from luthier.config.runs import Run, TrainRun
from luthier.core.errors import ModelError
from luthier.core.log import info, silence_libraries, warn
from luthier.data.cache.provenance import IMAGES_KEY, KINDS_KEY, read_record
from luthier.data.chat.encoder import Encoder
from luthier.data.chat.model_template import ModelChatTemplate
from luthier.data.chat.template_slots import choose_template
from luthier.data.media.blocks import MediaProcessor, require_supported
from luthier.data.media.expand import BARE, MediaSide, slots_of
from luthier.data.media.kinds import listens_to_videos, media_kind
from luthier.data.rows.encoding import Encoding
from luthier.data.sources.catalog import declared_media
from luthier.data.templates import Template
from luthier.inspection.at_start import report_template
from luthier.model.files.sources import ModelSource, check_source, local_path, model_source
from luthier.workflow.endings import with_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luthier.config.keys.model import ModelConfig
    from luthier.model.tokenizer import FittedTokenizer


VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A tokenizer with one of these is whole; that of `use_fast_tokenizer: false` has the second or the third."""


@dataclass(frozen=True, slots=True)
class TextSide:
    source: ModelSource
    """Of the model, whose tokenizer this is."""
    fitted: "FittedTokenizer"
    template: Template
    encoding: Encoding
    media: MediaProcessor | None = None
    """The processor of a model that sees or hears, if the data or the command have media."""

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return self.fitted.tokenizer


def tokenizer_source(keys: "ModelConfig", source: ModelSource) -> ModelSource:
    """The last adapter if a tokenizer lies beside it, which knows the tokens its training added; else the model."""
    if keys.adapter_name_or_path:
        folder = Path(local_path(keys.adapter_name_or_path[-1], source.access), keys.adapter_folder or "")
        names = ("tokenizer_config.json", *VOCABULARY_FILES)
        has_config, *has_vocabulary = ((folder / name).is_file() for name in names)
        if has_config and any(has_vocabulary):
            return replace(source, name=str(folder))
    return source


def load_text_side(
    run: "Run",
    source: ModelSource | None = None,
    *,
    reads_chat: bool = True,
    for_model: bool = True,
    sees: bool = False,
    needs_weights: bool = True,
) -> TextSide:
    """`source`: of the model, if it is located already. `reads_chat` false: rows are plain text, so a chat format is
    not looked for where none is named. `for_model` false: rows are only inspected, so tokens without a row in the
    embedding are a warning. `sees`: the processor is loaded whatever the data are. `needs_weights` false: the config of
    the model is enough.

    Raises `ModelError` for a tokenizer that cannot be loaded, `UnknownVariant` for an unknown template."""
    from luthier.data.chat.jinja import give_chat_template
    from luthier.model.loading.config import embedding_rows, load_config
    from luthier.model.tokenizer import load_tokenizer

    silence_libraries()
    model, data = run.model, run.data
    source = source or model_source(model)
    check_source(source, weights=for_model and needs_weights and not model.train_from_scratch)
    tokenizer = load_tokenizer(
        tokenizer_source(model, source),
        use_fast=model.use_fast_tokenizer,
        split_special_tokens=model.split_special_tokens,
    )
    num_rows = load_config(source).get_text_config().vocab_size if for_model else embedding_rows(source)
    name = data.template if reads_chat or data.template else "empty"
    template = choose_template(name, tokenizer, data.tool_format, data.default_system)
    runs_own = name in (None, "auto") and bool(tokenizer.chat_template)
    if runs_own:
        info("template: the model's own")
    if runs_own and not tokenizer.is_fast:
        info("template: this tokenizer does not tell where tokens begin, so prompts and answers are tokenized apart")
    has_eos = tokenizer.eos_token is not None
    fitted = fit_to_format(run, tokenizer, template, num_rows, for_model=for_model)
    if not has_eos and runs_own:  # a chat template may write the eos that the tokenizer has only now
        template = choose_template(name, tokenizer, data.tool_format, data.default_system)
    encoder = Encoder(tokenizer, split_special_tokens=model.split_special_tokens)
    settings = (data.enable_thinking, data.preserve_thinking)
    program = ModelChatTemplate(encoder, *settings, data.default_system or "") if runs_own else None
    kinds = kinds_of_media(run)
    media = _media(run, source, kinds, for_model=for_model) if sees or kinds else None
    if media is not None and program is not None:
        program = replace(program, marks=media.marks)
    side = None if media is None else media_side(media, template, encoder, program)
    encoding = Encoding(encoder, template, data.cutoff_len, *settings, program, side)
    if reads_chat:
        encoding = with_end(encoding, fitted.stop_token_ids)
        report_end(run, template, encoding)
        template = encoding.template
    if isinstance(run, TrainRun) and reads_chat and tokenizer.chat_template and not runs_own:
        report_template(encoding, model.model_name_or_path, fitted.stop_token_ids)
    give_chat_template(tokenizer, template)
    return TextSide(source, fitted, template, encoding, media)


def kinds_of_media(run: "Run") -> tuple[str, ...]:
    """The kinds of media that the data of a training run have.

    Raises `DataError` if tokenized rows have a damaged record."""
    if not isinstance(run, TrainRun):
        return ()
    if holds_tokenized_rows(run.data):
        assert run.data.tokenized_path is not None, "the rows are read from there"
        record = read_record(Path(run.data.tokenized_path))
        there = {} if record is None else record["chat_format"]
        return tuple(there.get(KINDS_KEY, ["image"] if IMAGES_KEY in there else []))
    return declared_media(run.data, hf_hub_token=run.model.hf_hub_token, cache_dir=run.model.cache_dir)


def _media(run: "Run", source: ModelSource, kinds: tuple[str, ...], *, for_model: bool) -> MediaProcessor | None:
    """That of the model. Where rows are only inspected, a model without one is a warning: rows with media are refused,
    and the others are shown."""
    try:
        return load_media(run, source, kinds)
    except ModelError as fault:
        if for_model:
            raise
        warn(str(fault))
        return None


def load_media(run: "Run", source: ModelSource, kinds: tuple[str, ...] = ()) -> MediaProcessor:
    """The processor of the model with the limits of the run. `kinds`: those that it has to take.

    Raises `ModelError` for a model that reads text only, or not these kinds, and `MissingExtra` without a library that
    the processor or the files need."""
    from luthier.model.media.processor import load_processor, processor_class, reads_text_only

    if reads_text_only(source):
        words = " and ".join(media_kind(name).plural for name in kinds) or "images"
        columns = ", ".join(f"{media_kind(name).column!r}" for name in kinds or ("image",))
        raise ModelError(
            f"{source.name}: the model reads text only, and the data declare {words} -> take another model, or remove"
            f" {columns} from the columns of the data"
        )
    if run.model.split_special_tokens:
        raise ModelError(
            "split_special_tokens: true would write the tokens of media as text -> leave it out for data with media"
        )
    require_supported(processor_class(source), kinds)
    for name in kinds:
        media_kind(name).require_libraries()
    processor, _ = load_processor(source, given_limits(run))
    hears_too = "video" in kinds and "audio" not in kinds and listens_to_videos(processor)
    return MediaProcessor(processor, (*kinds, "audio") if hears_too else kinds)


def media_side(
    media: MediaProcessor, template: Template, encoder: Encoder, program: ModelChatTemplate | None
) -> MediaSide:
    """How the chat format writes media. A format without a slot of its own writes what the chat template of the model
    has around an item."""
    own = program or (ModelChatTemplate(encoder, marks=media.marks) if encoder.tokenizer.chat_template else None)
    slots = {}
    for name in media.marks:
        before, after = (own.around_item(name) if own is not None else None) or ("", "")
        slots[name] = f"{before}{BARE}{after}"
    return MediaSide(media, slots if program is not None else {**slots, **slots_of(template.multimodal)})


def report_end(run: "Run", template: Template, encoding: Encoding) -> None:
    """Log how answers end where no format says so. `template`: before the end was settled."""
    eos = encoding.encoder.tokenizer.eos_token
    tell = warn if isinstance(run, TrainRun) else info
    if template.name == "auto" and not encoding.encoder.tokenizer.chat_template:
        tell(
            f"template: the model has no chat template, so no marks stand between question and answer, and an answer"
            f" ends in {eos!r} -> name a template, unless the rows hold their own marks"
        )
    elif encoding.template is not template:
        tell(
            f"template: {template.name} ends an answer in no token that generation stops at, so the end token {eos!r}"
            " is learned after it -> choose the template of the model, or set resize_vocab: true for new stop words"
        )


def fit_to_format(
    run: "Run",
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    num_rows: int,
    *,
    for_model: bool,
) -> "FittedTokenizer":
    """The tokenizer with the tokens that the chat format and the user ask for. `num_rows`: of the model's embedding."""
    from luthier.model.tokenizer import fit_tokenizer, read_new_special_tokens

    keys = run.features.new_tokens
    config_file = keys.new_special_tokens_config
    fitted = fit_tokenizer(
        tokenizer,
        stop_words=template.stop_words,
        replace_eos=template.replace_eos,
        add_tokens=keys.add_tokens,
        add_special_tokens=keys.add_special_tokens,
        new_special_tokens=read_new_special_tokens(Path(config_file)) if config_file else None,
        vocab_size=None if keys.may_grow or not for_model else num_rows,
        min_length_tokens=run.data.cutoff_len,
    )
    for note in fitted.notes:
        info(note)
    for warning in fitted.warnings:
        warn(warning)
    if len(tokenizer) > num_rows and not keys.may_grow and not run.model.adapter_name_or_path:
        warn(f"the embedding of the model has {num_rows:,} rows, too few for these tokens -> set resize_vocab: true")
    return fitted
