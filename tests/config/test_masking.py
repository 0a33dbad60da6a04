"""Secrets of a run are masked wherever it is shown."""

from luthier.config.load import load_train
from luthier.config.masking import masked
from tests.config.test_load import BASE, problems_of


def test_secrets_are_masked():
    keys = {"hf_hub_token": "x", "hub_token": "y", "swanlab_api_key": "z", "max_new_tokens": 5, "om_hub_token": None}
    run = load_train({**BASE, **keys})
    assert masked(run.given) == {
        **BASE,
        "dataset": ["d"],
        "hf_hub_token": "***",
        "hub_token": "***",
        "swanlab_api_key": "***",
        "max_new_tokens": 5,
        "om_hub_token": None,
    }
    assert "secret-value" not in str(problems_of(load_train, {**BASE, "hf_hub_token": ["secret-value"]}))
