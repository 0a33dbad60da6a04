"""What Megatron-Bridge tells reaches the log."""

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from luthier.workflow.megatron.bridge_log import BridgeLog, steps_of


class Heard(TrainerCallback):
    def __init__(self) -> None:
        self.events: list[str] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append(f"begin at {state.global_step}")

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append("end")


def context(**values):
    return SimpleNamespace(
        state=SimpleNamespace(train_state=SimpleNamespace(step=2)),
        optimizer=SimpleNamespace(param_groups=[{"lr": 0.25}]),
        **values,
    )


@pytest.mark.parametrize(
    ("keys", "logged"),
    [
        ({"logging_steps": 2}, [(4, 1.5), (6, 3.5)]),
        ({"logging_strategy": "epoch"}, [(5, 2.0)]),
        ({"logging_strategy": "no"}, []),
    ],
)
def test_losses_are_means_since_the_last_line(tmp_path, keys, logged):
    heard, saved = Heard(), []
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **keys)
    log = BridgeLog(args, [heard], steps=6, batch_size=2, num_rows=10, save=saved.append)
    log.on_train_start(context())
    for loss in (1.0, 2.0, 3.0, 4.0):
        log.on_train_step_start(context())
        log.on_train_step_end(context(loss_dict={"lm loss": torch.tensor(loss)}, grad_norm=0.5))
    log.on_train_end(context(model=["chunk"]))
    log.on_eval_end(context(total_loss_dict={"lm loss": torch.tensor(0.5)}))
    log.on_eval_end(context(total_loss_dict={"lm loss": torch.tensor(0.5)}))
    log.close()
    lines = log.state.log_history
    assert [(line["step"], line["loss"]) for line in lines if "loss" in line] == logged
    assert all((line["learning_rate"], line["grad_norm"]) == (0.25, 0.5) for line in lines if "loss" in line)
    assert [line["eval_loss"] for line in lines if "eval_loss" in line] == [0.5], "the same weights are told of once"
    assert log.metrics["train"]["train_loss"] == 2.5 and log.metrics["train"]["epoch"] == pytest.approx(1.2)
    assert heard.events == ["begin at 2", "end"] and saved == [["chunk"]]
    log.save_state()
    assert (tmp_path / "trainer_state.json").exists()


def test_a_share_of_the_steps():
    assert [steps_of(steps, 30) for steps in (500, 5.0, 0.1, 0.01)] == [500, 5, 3, 1]
