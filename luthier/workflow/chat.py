"""Opens a chat with the model of a run: its weights, chat format and sampling settings."""

from typing import TYPE_CHECKING

from luthier.core.kinds import ENGINES
from luthier.core.log import info

if TYPE_CHECKING:
    from luthier.config.runs import InferRun
    from luthier.infer.session import ChatSession


def open_chat(run: "InferRun") -> "ChatSession":
    """Load the model of a run and return a chat session; `luthier.chat({...})` calls this."""
    from luthier.infer.conversation import Conversation
    from luthier.infer.prompting import ModelTemplatePrompting, Prompting, TemplatePrompting
    from luthier.infer.session import ChatSession
    from luthier.infer.types import Settings
    from luthier.workflow.text import load_text_side

    text = load_text_side(run)
    program = text.encoding.model_template
    prompting: Prompting
    if program is not None:
        prompting = ModelTemplatePrompting(program, text.template.call_syntax)
    else:
        thinking, keep_thoughts = run.data.enable_thinking, run.data.preserve_thinking
        prompting = TemplatePrompting(text.template, text.encoding.encoder, thinking, keep_thoughts)
    model = ENGINES.get(run.model.infer_backend).open(run, text.source, text.tokenizer, set(text.fitted.stop_token_ids))
    info(f"ready: {run.model.model_name_or_path}, prompts in {prompting.description}")
    return ChatSession(model, Conversation(prompting), Settings.of(run.generating))
