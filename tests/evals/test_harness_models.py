"""Where an answer is cut. Answers and log-probabilities are compared with the harness in tasks/test_harness.py."""

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed")


@pytest.mark.parametrize(
    ("text", "stops", "left"),
    [("a b. c, d", (",", "."), "a b"), ("a b", ("x",), "a b"), ("a b", (), "a b"), (".", (".",), "")],
)
def test_an_answer_ends_at_the_first_stop(text, stops, left):
    from luthier.evals.harness_models import cut_at

    assert cut_at(text, stops) == left
