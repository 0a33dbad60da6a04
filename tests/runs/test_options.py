"""Keys of the training loop: each does what it says, measured on what comes out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

import luthier
from luthier.config.load import load_train
from luthier.core.errors import ConfigError, InvalidInput, RunFailed
from luthier.core.kinds import STAGES
from luthier.data.prepare import prepare
from luthier.training.trainer import StageTrainer
from luthier.workflow.text import load_text_side
from tests.matrix import representatives
from tests.runs.test_gradients import float64_model
from tests.small_world import losses, small_world
from tests.tiny import save_tiny, tiny_llama


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return {**small_world(tmp_path_factory.mktemp("world")), "max_steps": 3}


@pytest.fixture(scope="module")
def plain_losses(world) -> list[float]:
    return losses(luthier.train(world))


def learning_rates(result: Any) -> list[float]:
    return [logs["learning_rate"] for logs in result.log_history if "learning_rate" in logs]


def weights(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    (path,) = Path(values["output_dir"]).glob("*model.safetensors")
    return load_file(path)


# -- what must not change the losses ---------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, {"use_reentrant_gc": False}], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("finetuning_type", representatives(["lora", "full", "freeze"], "lora"))
def test_gradient_checkpointing_changes_no_loss(values, finetuning_type, keys):
    values = {**values, "finetuning_type": finetuning_type}
    kept = luthier.train({**values, "disable_gradient_checkpointing": True})
    recomputed = luthier.train({**values, **keys})
    assert losses(recomputed) == pytest.approx(losses(kept), abs=1e-5)


def test_attention_implementations_agree(values, plain_losses):
    for name in ("sdpa", "disabled"):
        assert losses(luthier.train({**values, "flash_attn": name})) == pytest.approx(plain_losses, abs=1e-4)


# -- what must change them ---------------------------------------------------------------------------


def test_neftune_adds_noise_while_training_only(values, plain_losses):
    keys = {"neftune_noise_alpha": 5.0, "do_eval": True, "eval_dataset": "numbers"}
    noisy = luthier.train({**values, **keys})
    assert losses(noisy)[0] != plain_losses[0] and abs(losses(noisy)[0] - plain_losses[0]) < 0.5
    again = luthier.train({**values, "do_train": False, **keys, "model_name_or_path": values["output_dir"]})
    assert noisy.metrics["eval"]["eval_loss"] == pytest.approx(again.metrics["eval"]["eval_loss"], abs=1e-5)


def test_label_smoothing_is_that_of_torch(values):
    """The first loss, before any step, against torch's over the same rows."""
    for factor in (0.0, 0.3):
        result = luthier.train({**values, "label_smoothing_factor": factor, "max_steps": 1})
        run = load_train(values)
        rows = prepare(run, STAGES.get("sft").rows, load_text_side(run).encoding).train.select(range(4))
        model, total, count = float64_model(values["model_name_or_path"]), 0.0, 0
        for row in rows:
            logits, labels = model(torch.tensor([row["input_ids"]])).logits[0, :-1], torch.tensor(row["labels"][1:])
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=factor).item()
            count += int((labels != -100).sum())
        assert losses(result)[0] == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("optim", representatives(["sgd", "adamw_torch", "adafactor", "rmsprop"], "sgd"))
def test_optimizers_learn(values, optim):
    rate = {"sgd": 0.5, "adafactor": 1e-2}.get(optim, 5e-3)
    result = luthier.train({**values, "optim": optim, "learning_rate": rate, "max_steps": 6})
    assert losses(result)[-1] < losses(result)[0] - 0.1


def test_weight_decay_shrinks_matrices_and_leaves_norms_alone(values):
    keys = {"learning_rate": 0.1, "weight_decay": 0.5, "adam_beta1": 0.0, "max_steps": 1, "adam_epsilon": 1e6}
    luthier.train({**values, **keys, "lr_scheduler_type": "constant"})
    before = load_file(Path(values["model_name_or_path"], "model.safetensors"))
    for name, after in weights(values).items():
        factor = 1.0 if "norm" in name else 1 - 0.1 * 0.5
        assert torch.allclose(after, before[name] * factor, atol=1e-6), name


SCHEDULES = {
    "linear": ({}, [1, 0.75, 0.5, 0.25]),
    "linear warmup_steps": ({"lr_scheduler_type": "linear", "warmup_steps": 2}, [0, 0.5, 1, 0.5]),
    "cosine": ({"lr_scheduler_type": "cosine"}, [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
    "cosine warmup_ratio": ({"lr_scheduler_type": "cosine", "warmup_ratio": 0.5}, [0, 0.5, 1, 0.5]),
    "constant": ({"lr_scheduler_type": "constant"}, [1, 1, 1, 1]),
    "constant_with_warmup": ({"lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.75}, [0, 1 / 3, 2 / 3, 1]),
    # One step of warm-up, one at the full rate, two of decay.
    "warmup_stable_decay": ({"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 1}, [0, 1, 1, 0.5]),
    "a stable step, the rest decays": (
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_stable_steps": 2}},
        [1, 1, 1, 0.5],
    ),
    "another decay": (
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"decay_type": "linear"}},
        [1, 1, 2 / 3, 1 / 3],
    ),
    "steps before ratio": (
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2, "warmup_ratio": 0.75},
        [0, 0.5, 1, 1],
    ),
}


@pytest.mark.parametrize(
    "name", representatives(SCHEDULES, "linear", "cosine warmup_ratio", "another decay", "steps before ratio")
)
def test_learning_rates_follow_the_schedule(values, name):
    keys, shares = SCHEDULES[name]
    result = luthier.train({**values, "max_steps": 4, "learning_rate": 1e-3, **keys})
    assert learning_rates(result) == pytest.approx([1e-3 * share for share in shares])


def test_the_gradient_is_clipped_to_max_grad_norm(values):
    """With SGD the step is rate x gradient, so its length is rate x max_grad_norm."""
    keys = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 1, "lr_scheduler_type": "constant"}
    before = load_file(Path(values["model_name_or_path"], "model.safetensors"))

    def step_length(result: Any) -> tuple[float, float]:
        steps = [(before[name] - after).square().sum() for name, after in weights(values).items()]
        (norm,) = [logs["grad_norm"] for logs in result.log_history if "grad_norm" in logs]
        return torch.stack(steps).sum().sqrt().item(), norm

    length, norm = step_length(luthier.train({**values, **keys, "max_grad_norm": 0.01}))
    assert norm > 0.1 and length == pytest.approx(0.01, rel=1e-3)
    length, norm = step_length(luthier.train({**values, **keys, "max_grad_norm": 1e9}))
    assert length == pytest.approx(norm, rel=1e-3)


def test_shuffling_changes_the_order_and_the_seed_decides(values):
    def order(**keys: Any) -> list[float]:
        return losses(luthier.train({**values, "disable_shuffling": False, "learning_rate": 0.0, **keys}))

    assert order() == order()
    assert order(seed=1) != order(seed=2)
    assert order(seed=1, data_seed=5) == order(seed=2, data_seed=5)
    assert losses(luthier.train({**values, "learning_rate": 0.0})) != order()


BY_LENGTH = ("group_by_length", "batch_rebalance")
PAIRED = {"stage": "dpo", "dataset": "pairs"}


@pytest.mark.parametrize("keys", [{}, PAIRED, {"stage": "rm", "dataset": "pairs"}], ids=["sft", "dpo", "rm"])
@pytest.mark.parametrize("strategy", BY_LENGTH)
def test_rows_of_like_lengths_are_read_together(values, keys, strategy, monkeypatch):
    """Both strategies read less padding than a shuffled order would have; the rows of a step may be the same."""
    # One of them balances the batches of a step, the other one sorts several steps.
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2 if strategy == "batch_rebalance" else 1}
    keys = {**keys, **sizes, "fast_path": False, "disable_shuffling": False, "max_steps": 12}
    compute_loss, paddings = StageTrainer.compute_loss, []

    def noting(self, model, inputs, *arguments, **more):
        lengths = inputs["cu_seq_lens_q"].diff()
        paddings[-1] += int((lengths.max() - lengths).sum())
        return compute_loss(self, model, inputs, *arguments, **more)

    monkeypatch.setattr(StageTrainer, "compute_loss", noting)
    for order in ({"train_sampling_strategy": strategy}, {}):
        paddings.append(0)
        luthier.train({**values, **keys, **order})
    by_length, shuffled = paddings
    assert by_length < shuffled


@pytest.mark.parametrize("strategy", BY_LENGTH)
def test_lengths_do_not_order_what_is_in_order_or_sampled(values, strategy):
    with pytest.raises(ConfigError, match="orders rows by their lengths, and disable_shuffling keeps the order"):
        load_train({**values, "train_sampling_strategy": strategy})
    rollouts = {"stage": "grpo", "reward_funcs": "tests.small_world:small_letters", "num_generations": 4}
    with pytest.raises(ConfigError, match="orders rows by their lengths, and here the answers that the model samples"):
        load_train({**values, **rollouts, "disable_shuffling": False, "train_sampling_strategy": strategy})


WAYS_TO_READ = {
    "rows": {},
    "stream": {"streaming": True},
    "rollouts": {"stage": "gkd", "gkd_lambda": 1.0, "max_new_tokens": 2, "temperature": 1.0},
}


@pytest.mark.parametrize("way", WAYS_TO_READ)
def test_data_seed_decides_the_order_alone(values, tmp_path, way):
    keys = {**values, **WAYS_TO_READ[way], "disable_shuffling": False, "learning_rate": 0.0}
    if way == "rollouts":
        keys["teacher_model"] = str(tiny_llama(tmp_path / "teacher", seed=7, max_position_embeddings=1024))

    def order(data_seed: int) -> list[float]:
        return losses(luthier.train({**keys, "data_seed": data_seed}))

    assert order(5) == order(5) != order(6)


@pytest.mark.parametrize("keys", WAYS_TO_READ.values(), ids=WAYS_TO_READ)
def test_sequential_is_the_order_of_the_dataset(values, tmp_path, keys):
    if "stage" in keys:
        teacher = tiny_llama(tmp_path / "teacher", seed=7, max_position_embeddings=1024)
        keys = {**keys, "learning_rate": 0.0, "teacher_model": str(teacher)}
    in_order = luthier.train({**values, **keys})
    sequential = {**values, **keys, "disable_shuffling": False, "train_sampling_strategy": "sequential"}
    assert losses(luthier.train(sequential)) == losses(in_order)


# -- number formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("finetuning_type", "dtype"), [("lora", torch.float32), ("full", torch.float32)])
def test_bf16_runs_on_a_cpu_and_learns_nearly_the_same(values, plain_losses, finetuning_type, dtype):
    result = luthier.train({**values, "bf16": True, "finetuning_type": finetuning_type, "max_steps": 6})
    assert losses(result)[0] == pytest.approx(plain_losses[0], abs=0.05)
    assert losses(result)[-1] < losses(result)[0]
    assert {weight.dtype for weight in weights(values).values()} == {dtype}


@pytest.mark.parametrize(
    "keys", [{"finetuning_type": "freeze"}, {"finetuning_type": "lora", "additional_target": "wte"}]
)
def test_bf16_with_layer_norm_and_weights_in_float32_beside_it(values, tmp_path, keys):
    """What is trained computes in float32, and the LayerNorm behind it is frozen."""
    config = AutoConfig.for_model("gpt2", n_layer=3, n_embd=32, n_head=4, n_positions=1024, vocab_size=320)
    model = save_tiny(tmp_path / "gpt2", config)
    keys = {"model_name_or_path": str(model), "freeze_trainable_layers": 1, **keys, "bf16": True}
    if keys["finetuning_type"] == "lora":
        del keys["freeze_trainable_layers"]
    result = luthier.train({**values, **keys})
    assert losses(result)[-1] < losses(result)[0]


def test_pure_bf16_keeps_sixteen_bits(values):
    result = luthier.train({**values, "pure_bf16": True, "max_steps": 6})
    assert losses(result)[-1] < losses(result)[0]
    assert {weight.dtype for weight in weights(values).values()} == {torch.bfloat16}


# -- logging and saving ----------------------------------------------------------------------------------


def test_logged_losses_are_means_since_the_line_before(values, plain_losses):
    result = luthier.train({**values, "logging_steps": 3})
    assert losses(result) == pytest.approx([sum(plain_losses) / 3])
    first = luthier.train({**values, "logging_steps": 3, "logging_first_step": True})
    assert losses(first) == pytest.approx([plain_losses[0], sum(plain_losses[1:]) / 2])


def test_tensorboard_writes_events(values, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(Path(values["output_dir"]) / "runs"))
    luthier.train({**values, "report_to": "tensorboard"})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = Path(values["output_dir"], "runs").rglob("events.out.tfevents.*")
    reader = EventAccumulator(str(events)).Reload()
    assert [event.step for event in reader.Scalars("train/loss")] == [1, 2, 3]


def test_a_tracker_that_is_not_installed_is_named(values):
    with pytest.raises(InvalidInput, match=r"comet_ml.*pip install"):
        luthier.train({**values, "report_to": "comet_ml"})


def test_input_tokens_are_counted(values):
    luthier.train({**values, "include_num_input_tokens_seen": "non_padding", "max_steps": 6, "save_strategy": "epoch"})
    state = json.loads(Path(values["output_dir"], "trainer_state.json").read_text())
    report = json.loads(Path(values["output_dir"], "data_report.json").read_text())
    assert state["num_input_tokens_seen"] == report["datasets"]["numbers"]["tokens"]
    lines = [json.loads(line) for line in Path(values["output_dir"], "trainer_log.jsonl").read_text().splitlines()]
    assert all("total_tokens" in line for line in lines if "loss" in line)


def test_only_the_newest_checkpoints_are_kept(values):
    luthier.train({**values, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_steps": 4})
    kept = {path.name for path in Path(values["output_dir"]).glob("checkpoint-*")}
    assert kept == {"checkpoint-3", "checkpoint-4"}


def test_the_best_and_the_newest_checkpoint_are_kept(values):
    keys = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_steps": 4, "learning_rate": 5.0}
    keys |= {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": "numbers", "load_best_model_at_end": True}
    result = luthier.train({**values, **keys})
    seen = {logs["step"]: logs["eval_loss"] for logs in result.log_history if "eval_loss" in logs}
    best = min(seen, key=seen.__getitem__)
    assert {p.name for p in Path(values["output_dir"]).glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-4"}


def test_a_checkpoint_may_hold_the_model_only(values):
    luthier.train({**values, "save_strategy": "steps", "save_steps": 3, "save_only_model": True})
    names = {path.name for path in Path(values["output_dir"], "checkpoint-3").iterdir()}
    assert {"model.safetensors", "trainer_state.json"} <= names
    assert not names & {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


def test_tokens_per_second_are_reported(values):
    result = luthier.train({**values, "max_steps": 6})
    speed = result.metrics["train"]["train_tokens_per_second"]
    num_tokens = json.loads(Path(values["output_dir"], "data_report.json").read_text())["datasets"]["numbers"]["tokens"]
    assert speed > 0.9 * num_tokens / result.metrics["train"]["train_runtime"]  # the start does not count


def test_a_non_finite_loss_stops_the_run(values):
    """It is looked at after every step, whenever it is logged, and the rows of the batch are named."""
    wild = {"learning_rate": 1e30, "max_grad_norm": 0, "optim": "sgd", "max_steps": 6, "logging_steps": 6}
    with pytest.raises(RunFailed, match=r"the loss became (nan|inf) at step [23]; no checkpoint was") as failure:
        luthier.train({**values, **wild})
    _, *rows = str(failure.value).splitlines()
    assert len(rows) == 4 and all("<|im_start|>user" in row and "Say the number" in row for row in rows)


@pytest.mark.parametrize("epochs", [1, 2.5])
def test_epochs_are_turned_into_steps(values, epochs):
    """24 rows in steps of 4 x 2 are 3 steps an epoch."""
    keys = {"max_steps": -1, "num_train_epochs": epochs, "gradient_accumulation_steps": 2}
    result = luthier.train({**values, **keys})
    assert len(losses(result)) == -(-epochs * 3 // 1)
    assert result.metrics["train"]["epoch"] == pytest.approx(len(losses(result)) / 3)


@pytest.mark.parametrize("key", ["fsdp", "deepspeed"])
def test_an_engine_of_many_processes_is_refused_where_torchrun_has_not_started_one(world, monkeypatch, key):
    """Not an error of the library that finds no group of processes."""
    pytest.importorskip("deepspeed")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    value = {"fsdp": "full_shard", "deepspeed": {"zero_optimization": {"stage": 2}}}[key]
    with pytest.raises(InvalidInput, match=f"{key}: needs the processes of torchrun.*FORCE_TORCHRUN=1"):
        luthier.train({**world, key: value})
