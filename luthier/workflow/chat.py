"""Opens a chat with the model of a run: its weights, chat format and sampling settings."""

from typing import TYPE_CHECKING

from luthier.core.errors import InvalidInput, MissingExtra, ModelError
from luthier.core.importing import without_collection
from luthier.core.kinds import ENGINES, STAGES
from luthier.core.log import info
from luthier.data.chat.answers import THINKING_TAGS

if TYPE_CHECKING:
    from luthier.config.runs import InferRun, Run
    from luthier.infer.engines import Generating
    from luthier.infer.prompting import Prompting
    from luthier.infer.session import ChatSession
    from luthier.workflow.text import TextSide


def open_chat(run: "InferRun") -> "ChatSession":
    """Load the model of a run and return a chat session; `luthier.chat({...})` calls this."""
    if STAGES.get(run.stage).head == "score":
        remedy = "`luthier api` serves its scores; leave stage out to talk to the model under its head"
        raise InvalidInput(f"stage: {run.stage}: a reward model scores texts and does not answer -> {remedy}")
    from luthier.infer.conversation import Conversation
    from luthier.infer.reading import AnswerFormat
    from luthier.infer.session import ChatSession
    from luthier.infer.types import Settings
    from luthier.model.tokenizer import special_texts

    with without_collection():  # of what the model imports, which is loaded next
        if run.model.adapter_name_or_path:
            import peft  # noqa: F401
        from transformers import GenerationMixin, PreTrainedModel  # noqa: F401

        text = load_seeing(run)
    prompting = prompting_of(run, text)
    model = open_engine(run, text)
    info(f"ready: {run.model.model_name_or_path}, prompts in {prompting.description}")
    answers = AnswerFormat(thinking_tags(text), text.template.call_syntax)
    settings, special = Settings.of(run.generating), special_texts(text.tokenizer)
    return ChatSession(model, Conversation(prompting), settings, answers, text.tokenizer.decode, special)


def open_engine(run: "InferRun", text: "TextSide") -> "Generating":
    """The engine of the run with its model; that of transformers takes images, videos and audio, if the model does."""
    from luthier.infer.engines.huggingface import HuggingFaceModel

    engine: Generating = ENGINES.get(run.model.infer_backend).open(
        run, text.source, text.tokenizer, set(text.fitted.stop_token_ids)
    )
    if text.media is not None and isinstance(engine, HuggingFaceModel):
        from luthier.workflow.seeing import pixels_of

        engine.pixels = pixels_of(engine.model, text.media)
    return engine


def load_seeing(run: "InferRun") -> "TextSide":
    """The text side with the processor of media, if the model takes some. Without one, text is read as ever."""
    from luthier.model.files.sources import model_source
    from luthier.model.media.processor import reads_text_only
    from luthier.workflow.text import load_text_side

    source = model_source(run.model)
    if reads_text_only(source):
        return load_text_side(run, source)
    try:
        return load_text_side(run, source, sees=True)
    except (ModelError, MissingExtra) as fault:
        text = load_text_side(run, source)  # raises again what is no matter of media
        info(f"images, videos and audio cannot be read: {fault}")
        return text


def prompting_of(run: "Run", text: "TextSide") -> "Prompting":
    """How the run writes conversations: with its chat format, or with the model's own chat template."""
    from luthier.infer.prompting import ModelTemplatePrompting, TemplatePrompting

    program = text.encoding.model_template
    if program is not None:
        return ModelTemplatePrompting(program, text.template.call_syntax, text.encoding.media)
    thinking, keeps_thoughts = run.data.enable_thinking, run.data.preserve_thinking
    return TemplatePrompting(text.template, text.encoding.encoder, thinking, keeps_thoughts, text.encoding.media)


def thinking_tags(text: "TextSide") -> tuple[str, str] | None:
    """The tags around thoughts; None if the chat format has none."""
    if text.template.reasons:
        return text.template.thinking_tags
    source = str(text.tokenizer.chat_template or "")
    if text.encoding.model_template is not None and THINKING_TAGS[1] in source:
        return THINKING_TAGS
    return None
