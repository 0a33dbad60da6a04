"""The table of a sweep, from folders as `luthier train` leaves them."""

import json

import pytest

from luthier.core.manifest import CONSOLE, EXIT
from luthier.workflow.sweep.grid import grid
from luthier.workflow.sweep.table import NO_EVALUATION, read_table, widest_key
from tests.working_folder import write


@pytest.fixture
def runs(folder, llama_folder):
    run_file = write(folder, model_name_or_path=str(llama_folder), finetuning_type="lora")
    return grid([run_file, "learning_rate=1e-4,1e-2", "lora_rank=8,16"])


def leave(one, status: int, printed: str = "", history=(), **results: float) -> None:
    """What a run leaves that ended with this status."""
    one.folder.mkdir(parents=True, exist_ok=True)
    (one.folder / EXIT).write_text(json.dumps({"status": status, "ended": 1.0}))
    (one.folder / CONSOLE).write_text(f"$ luthier train {one.folder}/board.yaml\n{printed}")
    if status == 0:
        (one.folder / "manifest.json").write_text("{}")
        (one.folder / "all_results.json").write_text(json.dumps(results))
        (one.folder / "trainer_state.json").write_text(json.dumps({"log_history": list(history)}))


def test_the_best_is_first_and_what_failed_is_named(runs):
    leave(runs[0], 0, eval_loss=2.0, train_loss=1.0, train_runtime=61.4)
    leave(runs[1], 0, eval_loss=0.5, train_loss=1.5, train_runtime=70.0)
    leave(runs[2], 1, "step 1\nluthier: an old error\nluthier: the loss is not finite\n  at step 3\nbye\n")
    table = read_table(runs)
    assert [row.name for row in table.rows] == [runs[1].name, runs[0].name, runs[2].name, runs[3].name]
    assert (table.metric, table.greater_is_better, table.num_done) == ("eval_loss", False, 2)
    assert [row.state for row in table.rows] == ["done", "done", "failed", "waiting"]
    text = table.as_text()
    heads, first = text.splitlines()[:2]
    assert heads.split() == ["run", "learning_rate", "lora_rank", "eval_loss", "train_loss", "seconds", "state"]
    assert first.split() == ["1", "1e-4", "16", "0.5", "1.5", "70", "done"]
    assert f"best by eval_loss: {runs[1].folder}" in text
    assert f"{runs[2].name} failed: the loss is not finite at step 3" in text
    assert table.remark(runs[1].name) == ", eval_loss 0.5, the best so far" and table.remark(runs[3].name) == ""


@pytest.mark.parametrize(
    ("status", "printed", "error"),
    [
        (-9, "step 1\n", "killed by SIGKILL, perhaps out of memory"),
        (1, "Traceback\nSomeError: no\n", "SomeError: no"),
        (3, "", "exit status 3"),
    ],
)
def test_errors_that_are_not_luthiers(runs, status, printed, error):
    leave(runs[0], status, printed)
    assert [row.error for row in read_table(runs).rows if row.state == "failed"] == [error]


def test_the_error_is_that_of_the_last_start(runs):
    leave(runs[0], 1, "luthier: old\n$ luthier train x\nSegmentation fault\nmore\n")
    assert read_table(runs).rows[0].error in ("more",)


def test_metric_for_best_model_decides(folder, llama_folder):
    data = {"val_size": 0.5, "eval_strategy": "steps", "compute_accuracy": True}
    run_file = write(
        folder,
        model_name_or_path=str(llama_folder),
        metric_for_best_model="eval_accuracy",
        finetuning_type="lora",
        **data,
    )
    runs = grid([run_file, "learning_rate=1,2"])
    leave(runs[0], 0, train_loss=1.0, history=[{"step": 1, "eval_accuracy": 0.9}, {"step": 2, "eval_accuracy": 0.25}])
    leave(runs[1], 0, train_loss=1.0, eval_accuracy=0.5)
    table = read_table(runs)
    assert table.greater_is_better and table.metric == "eval_accuracy"
    assert [row.metrics["eval_accuracy"] for row in table.rows] == [0.5, 0.25]


def test_without_evaluations_the_training_loss_decides(runs, folder):
    leave(runs[3], 0, train_loss=0.25, history=[{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}])
    table = read_table(runs)
    assert table.metric == "train_loss" and table.notes == [NO_EVALUATION]
    assert table.rows[0].losses == [(1, 0.5), (2, 0.25)]


def test_a_metric_that_no_evaluation_has_is_named(runs):
    """Each set has a loss of its own with `eval_on_each_dataset`."""
    each = {"eval_a_loss": 1.0, "eval_b_loss": 2.0, "eval_a_runtime": 0.1, "eval_b_steps_per_second": 9}
    leave(runs[0], 0, train_loss=0.5, history=[{"step": 1, **each}])
    table = read_table(runs)
    assert table.metric == "train_loss"
    why = "No evaluation has eval_loss, so train_loss decides"
    assert table.notes == [f"{why}; set metric_for_best_model: eval_a_loss or eval_b_loss."]


def test_markdown_json_and_plot(runs, folder):
    for number, one in enumerate(runs):
        leave(one, 0, eval_loss=number / 2, train_loss=1.0, history=[{"step": 1, "loss": 1}, {"step": 2, "loss": 2}])
    table = read_table(runs)
    table.save(folder, plots=True)
    lines = (folder / "sweep.md").read_text().splitlines()
    assert lines[1] == "|---|---|---|---|---|---|---|" and lines[2].startswith("| 1 | 1e-4 | 8 | 0 |")
    data = json.loads((folder / "sweep.json").read_text())
    assert data["metric"] == "eval_loss" and len(data["runs"]) == 4
    assert data["runs"][0]["values"] == {"learning_rate": "1e-4", "lora_rank": "8"}
    assert data["runs"][0]["output_dir"] == str(runs[0].folder)
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert widest_key(table.rows) == "learning_rate"
