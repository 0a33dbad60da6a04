"""POST /v1/score/evaluation: what a reward model thinks of texts."""

import uuid
from typing import Any

from luthier.core.errors import DeviceFailed
from luthier.serve.errors import ApiError, engine_ended
from luthier.serve.model import RewardModel
from luthier.serve.protocol import ScoreRequest


def scored(request: ScoreRequest, model: RewardModel) -> dict[str, Any]:
    """The body of the answer. Texts get no special tokens, and are cut at `max_length`. Slow: call it in a thread."""
    limit = request.max_length or model.num_positions
    if model.num_positions is not None and limit is not None:
        limit = min(limit, model.num_positions)
    texts = []
    for number, text in enumerate(request.messages):
        ids = list(model.tokenizer.encode(text, add_special_tokens=False))[:limit]
        if not ids:
            raise ApiError(f"messages[{number}]: the text is empty", param=f"messages[{number}]")
        texts.append(ids)
    try:
        scores = model.scores(texts)
    except DeviceFailed as fault:
        model.failures.append(fault)
        raise engine_ended(str(fault)) from fault
    return {
        "id": f"scoreval-{uuid.uuid4().hex}",
        "object": "score.evaluation",
        "model": model.name,
        "scores": scores,
    }
