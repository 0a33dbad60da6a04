"""Which backend a run asks for."""

import pytest

from luthier.config.load import load_infer, load_train
from luthier.core.errors import ConfigError
from luthier.core.kinds import BACKENDS
from luthier.model.backends import DEFAULT, backend_of


def test_transformers_is_the_default():
    run = load_infer({"model_name_or_path": "m"})
    assert backend_of(run).name == DEFAULT
    assert [name for name in BACKENDS.names if BACKENDS.get(name).is_chosen(run)] == []


def test_a_key_asks_for_another(monkeypatch):
    monkeypatch.setattr("luthier.config.rules.unsloth.is_installed", lambda name: True)
    assert backend_of(load_infer({"model_name_or_path": "m", "use_unsloth": True})).name == "unsloth"


@pytest.mark.parametrize("name", BACKENDS.names)
def test_every_backend_trains_and_generates(name):
    backend = BACKENDS.get(name)
    assert callable(backend.load_for_training)
    assert callable(backend.load_for_inference)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("use_unsloth", "needs the library unsloth, which is not installed"),
        ("use_kt", "needs the packages kt-kernel, transformers-kt, accelerate-kt"),
    ],
)
def test_a_backend_that_is_not_installed_is_a_problem(key, words):
    with pytest.raises(ConfigError, match=words):
        load_train({"model_name_or_path": "x", "dataset": "x", "output_dir": "x", key: True})
