"""The rules of Ray hold with USE_RAY=1 only; `broken.py` has a run file for each of them."""

import pytest

from luthier.config.load import load_train
from luthier.config.rules.ray import RAY_RULES
from luthier.core.errors import ConfigError

KEYS = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "do_train": True}
WRONG = {"ray_num_workers": 0, "master_port": "99999", "resources_per_worker": {"GPU": True}}


def test_each_is_told_at_once_with_ray(monkeypatch):
    monkeypatch.setenv("USE_RAY", "1")
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    monkeypatch.setenv("MAX_RESTARTS", "many")
    with pytest.raises(ConfigError) as caught:
        load_train({**KEYS, **WRONG})
    assert {problem.key for problem in caught.value.problems} == {rule.keys[0] for rule in RAY_RULES}


def test_without_ray_they_are_keys_that_nobody_reads(monkeypatch):
    monkeypatch.delenv("USE_RAY", raising=False)
    assert {warning.key for warning in load_train({**KEYS, **WRONG}).warnings} == set(WRONG)


@pytest.mark.parametrize("port", [None, "1", "65535"])
def test_ports(monkeypatch, port):
    monkeypatch.setenv("USE_RAY", "1")
    assert load_train({**KEYS, "master_port": port, "resources_per_worker": {"CPU": 0.5}}).ray.master_port == port
