"""BLEU-4 and ROUGE of generated texts, as `predict_with_generate` reports them.

ROUGE-1, -2 and -L are F1 scores over words, which jieba segments (Chinese by dictionary, other scripts by spaces).
BLEU-4 compares characters, with the geometric smoothing of Chen and Cherry (2014, method 3), so it works for English
and Chinese alike. All scores are in percent.
"""

import logging
from collections.abc import Sequence

from luthier.core.versions import require

METRICS = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")
PURPOSE = "scoring generated texts with BLEU and ROUGE"


def score_pairs(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean scores x 100 over the pairs, rounded to 4 places, by the names in `METRICS`.

    An empty prediction or reference scores 0. Raises `MissingExtra` if the extra `metrics` is not installed.
    """
    assert len(predictions) == len(references) > 0
    scores = [score_pair(prediction, reference) for prediction, reference in zip(predictions, references, strict=True)]
    return {name: round(sum(score[name] for score in scores) / len(scores), 4) for name in METRICS}


def score_pair(prediction: str, reference: str) -> dict[str, float]:
    """The scores x 100 of one prediction, not rounded."""
    return {**_rouge(prediction, reference), "bleu-4": _bleu_4(prediction, reference)}


def _rouge(prediction: str, reference: str) -> dict[str, float]:
    jieba = require("jieba", "metrics", PURPOSE)
    rouge_chinese = require("rouge_chinese", "metrics", PURPOSE)
    jieba.setLogLevel(logging.WARNING)  # otherwise it logs that it loads its dictionary
    hypothesis, target = (" ".join(jieba.cut(text)) for text in (prediction, reference))
    if not hypothesis.strip() or not target.strip():
        return dict.fromkeys(("rouge-1", "rouge-2", "rouge-l"), 0.0)
    scores = rouge_chinese.Rouge().get_scores(hypothesis, target)[0]
    return {name: 100 * score["f"] for name, score in scores.items()}


def _bleu_4(prediction: str, reference: str) -> float:
    bleu = require("nltk.translate.bleu_score", "metrics", PURPOSE)
    if not prediction or not reference:
        return 0.0
    smoothing = bleu.SmoothingFunction().method3
    return 100 * bleu.sentence_bleu([list(reference)], list(prediction), smoothing_function=smoothing)
