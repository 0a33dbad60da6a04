"""What transformers, hqq and bitsandbytes do at import, and that nothing is lost by putting it off.

If a test of the plain libraries fails, they have been mended, and that part of `luthier.model.compat.slow_imports` can
go.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from luthier.model.compat.slow_imports import _compiling_at_call, _index

HEAVY = ["datasets", "scipy.optimize", "torch._inductor.compile_fx"]


def printed(code: str, **environment: str) -> list[str]:
    """The lines that `code` prints in a fresh process."""
    return subprocess.check_output(
        [sys.executable, "-c", code], text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
    ).splitlines()


@pytest.mark.thorough
def test_the_plain_libraries_import_what_a_run_does_not_need():
    pytest.importorskip("hqq")
    code = f"import sys, transformers.trainer\nprint([name for name in {HEAVY} if name in sys.modules])"
    assert printed(code)[-1] == str(HEAVY)


@pytest.mark.thorough
def test_a_plan_does_not_import_the_trainer():
    code = "import sys, luthier.workflow.plan.make\nprint('transformers.trainer_callback' in sys.modules)"
    assert printed(code)[-1] == "False"


UNWRAPPED = """
import sys, torch
{install}
from accelerate.utils import extract_model_from_parallel, is_deepspeed_available
model = torch.nn.Linear(2, 2)
assert extract_model_from_parallel(model) is model and is_deepspeed_available()
print("deepspeed" in sys.modules)
"""


@pytest.mark.thorough
@pytest.mark.parametrize("is_put_off", [False, True])
def test_deepspeed_is_not_imported_to_unwrap_a_model(is_put_off):
    pytest.importorskip("deepspeed")
    install = "from luthier.model.compat import slow_imports; slow_imports.install()" if is_put_off else ""
    assert printed(UNWRAPPED.replace("{install}", install))[-1] == str(not is_put_off)


DEFERRED = """
from luthier.model.compat import slow_imports
slow_imports.install()
import torch
compile_now = torch.compile
from transformers import trainer, cache_utils
from transformers.loss import loss_for_object_detection as loss
import numpy as np, sys
assert torch.compile is compile_now
for name in ("datasets", "pandas", "scipy.optimize", "torch._inductor.compile_fx"):
    assert name not in sys.modules, name
assert not trainer.is_datasets_available()
assert loss.is_scipy_available() and "scipy.optimize" not in sys.modules
assert [part.tolist() for part in loss.linear_sum_assignment(np.array([[1, 0], [0, 1]]))] == [[0, 1], [1, 0]]
from transformers import modelcard
from transformers.integrations import integration_utils
assert modelcard.is_datasets_available() and integration_utils.is_datasets_available()
import datasets
assert trainer.is_datasets_available() and trainer.datasets.Dataset is datasets.Dataset
from transformers.utils import is_datasets_available, is_scipy_available
assert is_datasets_available() and is_scipy_available()
import transformers
print(len([name for name in dir(transformers) if getattr(transformers, name, None) is not None][:5]))
"""


@pytest.mark.thorough
def test_everything_put_off_is_there_when_it_is_used(tmp_path):
    assert printed(DEFERRED, LUTHIER_CACHE=str(tmp_path))[-1] == "5"
    assert list((tmp_path / "transformers").glob("*.json"))


def test_functions_are_compiled_at_their_first_call(monkeypatch):
    compiled = []

    def compile_now(function, **options):
        compiled.append((function.__name__, options))
        return lambda *args: ("compiled", function(*args))

    monkeypatch.setattr(torch, "compile", compile_now)
    with _compiling_at_call(torch):
        plain = torch.compile(lambda x: x)

        @torch.compile(dynamic=False)
        def twice(x):
            return 2 * x

    assert torch.compile is compile_now and compiled == [] and twice.__name__ == "twice"
    assert [twice(3), twice(4), plain(5)] == [("compiled", 6), ("compiled", 8), ("compiled", 5)]
    assert compiled == [("twice", {"dynamic": False}), ("<lambda>", {})]


def test_the_index_of_the_models_is_read_from_the_cache_until_a_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    models = tmp_path / "transformers" / "models"
    models.mkdir(parents=True)
    (models / "a.py").write_text("")
    index = {frozenset(): {"a": {"A", "B"}}, frozenset({"torch", "vision"}): {"b.c": {"C"}}}
    asked = []

    def define(folder: Path):
        asked.append(folder)
        return index

    def read():
        _index.cache_clear()
        return _index(models, define)

    assert [read(), read()] == [index, index] and asked == [models]
    assert list(read()) == list(index), "the order decides where a name is looked up"
    (models / "a.py").write_text("changed")
    assert read() == index and len(asked) == 2
    (cached,) = (tmp_path / "cache" / "transformers").iterdir()
    cached.write_text("{")
    assert read() == index and len(asked) == 3
    _index.cache_clear()
