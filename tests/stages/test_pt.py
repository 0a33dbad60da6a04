"""Continued pre-training: the loss of an evaluation as perplexity."""

import math

import pytest

from luthier.stages.pt import perplexity


def test_perplexity_is_the_exponential_of_the_loss():
    assert perplexity({"loss": math.log(50)})["perplexity"] == pytest.approx(50)
    assert perplexity({"learning_rate": 1e-4}) == {}


def test_a_model_that_has_diverged_has_an_infinite_perplexity():
    """No float holds exp(710)."""
    assert perplexity({"loss": 709.0})["perplexity"] < math.inf
    assert perplexity({"loss": 1e4})["perplexity"] == math.inf
