"""The folder and the process of one run of a sweep."""

import json
from dataclasses import replace

import pytest
import yaml

from luthier.core.errors import OutputError
from luthier.core.manifest import CONSOLE, EXIT, RUN_FILE
from luthier.workflow.sweep.grid import grid
from luthier.workflow.sweep.one_run import RunProcess, problem_of, state_of
from tests.working_folder import write


@pytest.fixture
def one(folder, llama_folder):
    run_file = write(folder, model_name_or_path=str(llama_folder), finetuning_type="lora")
    return grid([run_file, "lora_rank=8,16", "hub_token=hf_secret"])[0]


def test_the_run_file_says_all_but_secrets_and_one_process_has_the_folder(one):
    process = RunProcess(one.folder, one.keys())
    text = (one.folder / RUN_FILE).read_text()
    keys = yaml.safe_load(text)
    assert (
        keys["lora_rank"] == 8
        and keys["output_dir"] == str(one.folder.absolute())
        and keys["overwrite_output_dir"] is False
    )
    assert "hf_secret" not in text and process.environment["LUTHIER_HUB_TOKEN"] == "hf_secret"
    assert keys["hub_token"] == "${oc.env:LUTHIER_HUB_TOKEN}"
    with pytest.raises(OutputError, match="a run is going on in this folder"):
        RunProcess(one.folder, one.keys())
    process.console.close()
    assert state_of(one.folder) == "waiting" and problem_of(one) is None


@pytest.mark.parametrize("held", ["nothing", "a finished run", "a checkpoint"])
def test_a_folder_with_other_keys_is_refused_once_something_depends_on_them(one, held):
    RunProcess(one.folder, one.keys()).console.close()
    if held == "a finished run":
        (one.folder / EXIT).write_text(json.dumps({"status": 0}))
        (one.folder / "manifest.json").write_text("{}")
    elif held == "a checkpoint":
        (one.folder / "checkpoint-1").mkdir()
    assert problem_of(one) is None
    other = replace(one, run=replace(one.run, given={**one.run.given, "max_steps": 3}))
    problem = problem_of(other)
    assert (problem is None) == (held == "nothing")
    assert problem is None or "max_steps: unset there, 3 here" in problem.reason


def test_a_folder_of_something_else_is_refused(one):
    one.folder.mkdir(parents=True)
    (one.folder / CONSOLE).touch()  # killed before the run file was written
    assert problem_of(one) is None
    (one.folder / "model.safetensors").touch()
    assert "no sweep wrote" in problem_of(one).reason


@pytest.mark.parametrize(("status", "state"), [(0, "waiting"), (1, "failed"), (-9, "failed"), (130, "stopped")])
def test_states(one, status, state):
    """Status 0 without a manifest: the folder was emptied since."""
    one.folder.mkdir(parents=True)
    (one.folder / EXIT).write_text(json.dumps({"status": status}))
    assert state_of(one.folder) == state
    (one.folder / "manifest.json").touch()
    assert state_of(one.folder) == ("done" if status == 0 else state)
