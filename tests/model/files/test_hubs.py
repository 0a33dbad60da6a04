"""Models of ModelScope and Modelers: fetched once by the hub's library, then local folders under the name given.

The libraries are modules of a few lines on `sys.path` that serve a folder; their calls are those of modelscope 1.40 and
openmind_hub 1.3.
"""

import json
import subprocess
import sys

import pytest

from luthier.config.keys.hubs import HUBS, HubTokens, hub_in_use
from luthier.config.load import load_infer, load_train, read_source
from luthier.core.errors import ConfigError, MissingExtra, ModelError
from luthier.model.backends import load_for_inference
from luthier.model.files import hubs
from luthier.model.files.hubs import HubAccess
from luthier.model.files.sources import ModelSource
from luthier.model.loading.config import load_config
from luthier.model.loading.load import load_model
from luthier.model.tokenizer import load_tokenizer
from luthier.workflow.preflight import load_checked
from luthier.workflow.training import train
from tests.model.test_multimodal import CLIP, LLAMA
from tests.tiny import tiny_llama

CLIENT = """
import json, pathlib
ROOT = pathlib.Path({root!r})

class NotExistError({base}):
    pass

def snapshot_download({first}, {star}revision=None, cache_dir=None, local_files_only=False, token=None):
    name = {first}
    call = {{"name": name, "revision": revision, "cache_dir": cache_dir, "local": local_files_only, "token": token}}
    with open(ROOT / "calls.jsonl", "a") as file:
        file.write(json.dumps(call) + "\\n")
    if (ROOT / "down").exists() and not local_files_only:
        raise ConnectionError("the line is dead\\nand more")
    if not (ROOT / name).is_dir():
        raise NotExistError(f"{{name}} does not exist\\n<html>")
    return str(ROOT / name)
"""


class StandIn:
    def __init__(self, root):
        self.root = root

    @property
    def calls(self):
        file = self.root / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(autouse=True)
def forgotten():
    hubs._fetch.cache_clear()
    hubs._FOLDERS.clear()


@pytest.fixture(params=["modelscope", "openmind_hub"])
def library(request):
    return request.param


@pytest.fixture
def hub(tmp_path, monkeypatch, library):
    """One hub, in use, with the model `org/tiny`, and nothing else of it on this machine."""
    root, place = tmp_path / "hub", tmp_path / "site" / library
    tiny_llama(root / "org" / "tiny")
    place.mkdir(parents=True)
    own = library == "modelscope"
    words = {"root": str(root), "first": "model_id" if own else "repo_id", "star": "" if own else "*, "}
    code = CLIENT.format(base="Exception" if own else "OSError", **words)
    (place / "__init__.py").write_text("from modelscope.hub.errors import *\n" if own else code)
    if own:
        (place / "hub").mkdir()
        (place / "hub" / "__init__.py").write_text("")
        (place / "hub" / "errors.py").write_text(code)
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("USE_MODELSCOPE_HUB" if own else "USE_OPENMIND_HUB", "1")
    # The name of the true host leads nowhere where there is no network, and is not looked up then.
    monkeypatch.setenv("MODELSCOPE_ENDPOINT" if own else "OPENMIND_HUB_ENDPOINT", "https://hub.invalid")
    yield StandIn(root)
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        del sys.modules[name]


def test_a_name_is_fetched_once_and_kept(hub, library, tmp_path):
    access = HubAccess(cache_dir=str(tmp_path / "cache"), token="t")
    source = ModelSource("org/tiny", access)
    config = load_config(source)
    tokenizer = load_tokenizer(source)
    model = load_model(ModelSource("org/tiny", access), config=config, dtype=config.dtype)
    assert len(tokenizer) == 261
    assert model.name_or_path == model.config._name_or_path == "org/tiny"
    revision = "master" if library == "modelscope" else "main"
    expected = {"name": "org/tiny", "revision": revision, "cache_dir": access.cache_dir, "local": False, "token": "t"}
    assert hub.calls == [expected]


def test_another_revision_is_asked_for_by_its_own_name(hub):
    assert ModelSource("org/tiny", HubAccess(revision="v2")).files.name == str(hub.root / "org" / "tiny")
    assert hub.calls[0]["revision"] == "v2"


def test_what_lies_here_is_not_asked_for(hub, llama_folder):
    assert ModelSource(str(llama_folder)).files.name == str(llama_folder)
    assert hub.calls == []


def test_a_run_learns_on_it_and_its_adapter_comes_back_from_there(hub, tmp_path, library):
    """The adapter names its base as the run file does; put on the hub itself, it is fetched like a model."""
    rows = [{"instruction": f"say {n}", "output": f"it is {n}"} for n in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    keys = {"model_name_or_path": "org/tiny", "finetuning_type": "lora", "cache_dir": str(tmp_path / "cache")}
    keys |= {"ms_hub_token": "m", "om_hub_token": "o", "hf_hub_token": "h"}
    adapter = hub.root / "org" / "adapter"
    world = {"dataset": "rows", "dataset_dir": str(tmp_path), "template": "default", "max_steps": 1, "do_train": True}
    train(load_train({**keys, **world, "output_dir": str(adapter), "report_to": "none"}))
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/tiny"
    model = load_for_inference(load_infer({**keys, "adapter_name_or_path": "org/adapter", "template": "default"}))
    assert model.name_or_path == "org/tiny"
    assert [call["name"] for call in hub.calls] == ["org/tiny", "org/adapter"]
    assert {call["token"] for call in hub.calls} == {"m" if library == "modelscope" else "o"}


@pytest.mark.parametrize("library", ["modelscope"], indirect=True)
def test_the_processor_is_copied_from_what_was_fetched(hub, tmp_path, monkeypatch):
    from transformers import AutoConfig, AutoModelForImageTextToText

    from luthier.model.media.processor import copy_processor

    folder = hub.root / "org" / "sees"
    AutoModelForImageTextToText.from_config(
        AutoConfig.for_model("llava", text_config=LLAMA, vision_config=CLIP)
    ).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    config = load_config(ModelSource("org/sees"))
    copy_processor(load_model(ModelSource("org/sees"), config=config, dtype=config.dtype), tmp_path)
    assert (tmp_path / "preprocessor_config.json").is_file()
    assert hubs.fetched("org/sees") == str(folder)
    monkeypatch.delenv("USE_MODELSCOPE_HUB")
    assert hubs.fetched("org/sees") == "org/sees", "a later run of this process asks another hub"


def test_a_name_that_the_hub_does_not_have_is_one_sentence(hub, library):
    title, key = ("ModelScope", "ms_hub_token") if library == "modelscope" else ("Modelers", "om_hub_token")
    with pytest.raises(ModelError) as caught:
        load_config(ModelSource("org/none"))
    assert f"org/none: there is no folder of this name here, and {title} does not give one" in str(caught.value)
    assert "(org/none does not exist) -> check the name" in str(caught.value)
    assert key in str(caught.value) and "\n" not in str(caught.value)


def test_without_an_answer_what_was_fetched_before_is_taken_and_said(hub, said):
    (hub.root / "down").touch()
    assert load_tokenizer(ModelSource("org/tiny")).eos_token == "</s>"
    assert [call["local"] for call in hub.calls] == [False, True]
    assert any("taken from what was fetched before" in line and "(the line is dead)" in line for line in said)
    with pytest.raises(ModelError, match=r"does not give one \(the line is dead\)"):
        load_tokenizer(ModelSource("org/none"))


def test_a_host_that_has_no_address_is_not_tried(hub, monkeypatch, said):
    """Its library would try for half a minute."""
    import socket

    def nowhere(*_):
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    for variable in ("MODELSCOPE_ENDPOINT", "OPENMIND_HUB_ENDPOINT", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)
    with pytest.raises(ModelError, match=r"\(model\w+\.cn: Name or service not known\)"):
        load_config(ModelSource("org/none"))
    load_config(ModelSource("org/tiny"))
    assert [call["local"] for call in hub.calls] == [True, True]


@pytest.mark.parametrize("hub_of", HUBS, ids=lambda hub: hub.module)
def test_a_missing_library_is_told_before_anything_is_loaded(hub_of, monkeypatch):
    monkeypatch.setenv(hub_of.variable, "1")
    monkeypatch.setattr("luthier.workflow.preflight.requirements.is_installed", lambda module: False)
    monkeypatch.setattr("luthier.core.versions.is_installed", lambda module: False)
    keys = {"model_name_or_path": "org/tiny", "adapter_name_or_path": "org/a,org/b"}
    with pytest.raises(ConfigError) as caught:
        load_checked("infer", read_source(keys), begins=True)
    assert [problem.key for problem in caught.value.problems] == ["model_name_or_path", *["adapter_name_or_path"] * 2]
    assert all(problem.remedy == f"pip install 'luthier[{hub_of.extra}]'" for problem in caught.value.problems)
    with pytest.raises(MissingExtra, match=f"needs the library `{hub_of.module}`.*luthier.{hub_of.extra}"):
        load_config(ModelSource("org/tiny"))


def test_the_missing_library_is_told_without_torch(tmp_path):
    code = (
        "import sys\nfrom luthier.cli import main\n"
        "status = main(['chat', 'model_name_or_path=org/tiny'])\nprint(status, 'torch' in sys.modules)"
    )
    words = {"PATH": "/usr/bin", "USE_MODELSCOPE_HUB": "1", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=words)
    if "its library modelscope is not installed" not in done.stderr:
        pytest.skip("modelscope is installed here")
    assert done.stdout.strip() == "2 False"


def test_which_hub_is_in_use_and_whose_token_it_is_told(monkeypatch):
    keys = load_infer({"model_name_or_path": "x", "hf_hub_token": "h", "ms_hub_token": "m", "om_hub_token": "o"}).model
    assert HubTokens.of(keys) == HubTokens(hf_hub="h", ms_hub="m", om_hub="o")
    assert (hub_in_use(), hubs.hub_token(keys)) == (None, "h")
    monkeypatch.setenv("USE_OPENMIND_HUB", "y")
    assert (hub_in_use(), hubs.hub_token(keys)) == (HUBS[1], "o")
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "true")
    assert (hub_in_use(), hubs.hub_token(keys)) == (HUBS[0], "m")
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "0")
    assert hub_in_use() == HUBS[1]
