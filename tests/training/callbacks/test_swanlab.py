"""SwanLab with the keys of a run file. What needs its library runs with the real one, on records kept here."""

import json
from typing import Any

import pytest

import luthier
from luthier.config.load import load_train
from luthier.core.errors import ConfigError, MissingExtra, RunFailed
from luthier.core.kinds import STAGES
from luthier.training.callbacks import callbacks_of
from luthier.training.callbacks import swanlab as tracker
from luthier.workflow.preflight.requirements import library_problems
from tests.small_world import losses, small_world

RUN: dict[str, Any] = {"model_name_or_path": "x", "dataset": "x", "output_dir": "x", "use_swanlab": True}
KEY = "sk-very-secret"


def test_the_library_is_a_problem_if_it_is_missing(monkeypatch):
    monkeypatch.setattr("luthier.workflow.preflight.requirements.is_installed", lambda module: False)
    (problem,) = [problem for problem in library_problems(load_train(RUN)) if problem.key == "use_swanlab"]
    assert str(problem).endswith("needs the library swanlab, which is not installed -> pip install 'swanlab>=0.10'")
    monkeypatch.setattr(tracker, "is_installed", lambda module: False)
    with pytest.raises(MissingExtra, match="use_swanlab: true needs the library swanlab: pip install"):
        callbacks_of(load_train(RUN), STAGES.get("sft"))


def test_keys_without_effect_are_a_warning():
    local = load_train(RUN | {"swanlab_mode": "local", "swanlab_api_key": KEY})
    (warning,) = [warning for warning in local.warnings if warning.key == "swanlab_api_key"]
    assert "local records need no account" in warning.reason and KEY not in str(warning)
    off = load_train(RUN | {"use_swanlab": False, "swanlab_mode": "local"})
    assert any("only by use_swanlab: true" in warning.reason for warning in off.warnings)


def test_a_secret_without_an_address_is_an_error_that_hides_it():
    with pytest.raises(ConfigError, match="there is no address to send them to") as caught:
        load_train(RUN | {"swanlab_lark_secret": KEY})
    assert KEY not in str(caught.value)


@pytest.fixture
def library(monkeypatch, tmp_path):
    """The real library, with no account and no settings but those of the test."""
    swanlab = pytest.importorskip("swanlab", reason="swanlab is not installed")
    monkeypatch.setenv("SWANLAB_SAVE_DIR", str(tmp_path / "home"))
    yield swanlab
    if swanlab.has_run():
        swanlab.finish()


def test_a_run_is_recorded_with_its_keys_and_its_secrets_stay_secret(library, tmp_path):
    world = small_world(tmp_path / "world") | {"use_swanlab": True, "swanlab_mode": "local", "max_steps": 3}
    world |= {"swanlab_logdir": str(tmp_path / "logs"), "swanlab_project": "proof", "swanlab_run_name": "first"}
    world |= {"report_to": "swanlab", "swanlab_lark_webhook_url": f"http://127.0.0.1:9/{KEY}"}
    result = luthier.train(world | {"swanlab_api_key": KEY})
    assert len(losses(result)) == 3
    assert library.get_run().name == "first"
    facts = json.loads((result.output_dir / tracker.PUBLIC_FILE).read_text("utf-8"))
    assert facts["name"] == "first" and facts["mode"] == "local"
    assert facts["dir"].startswith(str(tmp_path / "logs"))
    library.finish()
    written = [file.read_bytes() for file in result.output_dir.rglob("*") if file.is_file()]
    assert not any(KEY.encode() in content for content in written)


def test_a_failed_login_is_one_error(library, monkeypatch):
    def refuse(api_key):
        raise library.exceptions.AuthenticationError(f"no such key: {api_key}")

    monkeypatch.setattr(library, "login", refuse)
    with pytest.raises(RunFailed, match=r"swanlab_api_key: login to SwanLab failed .*local") as caught:
        callbacks_of(load_train(RUN | {"swanlab_api_key": KEY}), STAGES.get("sft"))
    assert KEY not in str(caught.value)
