"""BLEU and ROUGE, worked out by hand.

ROUGE-n of "the cat" against "the dog": jieba cuts the words the / cat and the / dog, one of two unigrams is shared, so
precision = recall = F1 = 1/2; the only bigrams differ, so ROUGE-2 = 0; the longest common subsequence is "the": 1/2.
"""

import math

import pytest

from luthier.core import versions
from luthier.core.errors import MissingExtra
from luthier.evals.text_metrics import METRICS, score_pair, score_pairs

pytest.importorskip("jieba")


def test_equal_texts_score_100():
    scores = score_pairs(["the cat sat"], ["the cat sat"])
    assert tuple(scores) == METRICS
    assert scores == pytest.approx(dict.fromkeys(METRICS, 100), abs=1e-3)


def test_rouge_counts_words():
    scores = score_pair("the cat", "the dog")
    assert scores["rouge-1"] == pytest.approx(50, abs=1e-5)
    assert scores["rouge-2"] == 0
    assert scores["rouge-l"] == pytest.approx(50, abs=1e-5)


def test_chinese_is_cut_into_words():
    """今天天气 / 很 / 好 against 今天天气 / 不错: 1 of 3 and of 2 words, F1 = 2 (1/3 1/2) / (1/3 + 1/2) = 2/5."""
    assert score_pair("今天天气很好", "今天天气不错")["rouge-1"] == pytest.approx(40, abs=1e-5)


def test_bleu_counts_characters():
    """abcd against abce: n-gram precisions 3/4, 2/3, 1/2 and 0 of 1, which method 3 makes 1/2; the length is right.

    BLEU = (3/4 * 2/3 * 1/2 * 1/2) ** (1/4) = (1/8) ** (1/4).
    """
    assert score_pair("abcd", "abce")["bleu-4"] == pytest.approx(100 * 0.125**0.25)


def test_bleu_punishes_brevity():
    """abcd against abcdefgh: every precision is 1, the brevity penalty exp(1 - 8/4)."""
    assert score_pair("abcd", "abcdefgh")["bleu-4"] == pytest.approx(100 * math.exp(-1))


@pytest.mark.parametrize(("prediction", "reference"), [("", "x"), ("x", ""), ("", ""), (" \n", "x")])
def test_nothing_said_scores_0(prediction, reference):
    assert score_pair(prediction, reference) == dict.fromkeys(METRICS, 0)


def test_scores_are_means_rounded_to_four_places():
    scores = score_pairs(["the cat", "", "abcd"], ["the dog", "x", "abce"])
    assert scores["rouge-1"] == 16.6667
    assert scores["bleu-4"] == round((score_pair("the cat", "the dog")["bleu-4"] + 0 + 100 * 0.125**0.25) / 3, 4)


def test_a_missing_library_is_one_sentence(monkeypatch):
    monkeypatch.setattr(versions, "is_installed", lambda module: module != "jieba")
    with pytest.raises(MissingExtra, match=r"needs the library `jieba`.*pip install 'luthier\[metrics\]'"):
        score_pairs(["a"], ["b"])
