"""Loads the model that a run file names, to be served."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.kinds import STAGES
from luthier.core.log import info
from luthier.infer.types import Settings
from luthier.serve.images import ONLY_SENT, ImageRules
from luthier.serve.model import ChatModel, Loaded, RewardModel
from luthier.serve.token_texts import TokenTexts
from luthier.workflow.chat import load_seeing, open_engine, prompting_of, thinking_tags
from luthier.workflow.text import TextSide, load_text_side

if TYPE_CHECKING:
    from luthier.config.runs import InferRun


def load_model(run: "InferRun", name: str | None, images: ImageRules = ONLY_SENT) -> Loaded:
    """The model, and what releases it. `name`: under which it is served; None for the name of its folder. `images`:
    which of them requests may have, if the model sees."""
    if STAGES.get(run.stage).head == "score":
        return _reward_model(run, load_text_side(run), name), lambda: None
    return _chat_model(run, load_seeing(run), name, images)


def default_name(path: str) -> str:
    """The last part of a path or of a name on the hub."""
    return Path(path).name or Path(path).resolve().name


def _facts(run: "InferRun", text: TextSide, name: str | None) -> dict[str, Any]:
    from luthier.model.loading.config import load_config

    config = load_config(text.source).get_text_config()
    return {
        "name": name or default_name(run.model.model_name_or_path),
        "tokenizer": text.tokenizer,
        "texts": TokenTexts(text.tokenizer),
        "num_positions": getattr(config, "max_position_embeddings", None),
        "vocab_size": max(config.vocab_size, len(text.tokenizer)),
        "created": int(time.time()),
    }


def _chat_model(run: "InferRun", text: TextSide, name: str | None, images: ImageRules) -> Loaded:
    prompting = prompting_of(run, text)
    engine = open_engine(run, text)
    info(f"loaded: {run.model.model_name_or_path}, prompts in {prompting.description}")
    model = ChatModel(
        **{**_facts(run, text, name), "num_positions": engine.num_positions},
        engine=engine,
        prompting=prompting,
        settings=Settings.of(run.generating),
        call_syntax=text.template.call_syntax,
        thinking_tags=thinking_tags(text),
        images=None if text.media is None else images,
    )
    _answer_once(model)
    return model, engine.close


def _answer_once(model: ChatModel) -> None:
    """The first answer of a process takes longer, so it is not left to the first caller."""
    first = next((i for i in (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id) if isinstance(i, int)), 0)
    model.engine.generate([first], replace(model.settings, max_new_tokens=1, do_sample=False))


def _reward_model(run: "InferRun", text: TextSide, name: str | None) -> RewardModel:
    from luthier.model.backends import load_for_inference
    from luthier.model.embeddings import fit_embeddings
    from luthier.model.heads.score_head import score_layer

    model: Any = load_for_inference(run, source=text.source, scores=True)
    fit_embeddings(model, text.tokenizer)
    score_layer(model)
    info(f"loaded: {run.model.model_name_or_path}, a reward model")

    def scores(texts: Sequence[Sequence[int]]) -> list[float]:
        import torch

        from luthier.model.failed_device import require_working_device
        from luthier.model.heads.score_head import position_scores

        found = []
        try:
            with torch.inference_mode():
                for ids in texts:
                    inputs = {"input_ids": torch.tensor([list(ids)], device=model.device)}
                    found.append(position_scores(model, inputs)[-1].item())
        except RuntimeError as fault:
            require_working_device(fault)
            raise
        return found

    return RewardModel(**_facts(run, text, name), scores=scores)
