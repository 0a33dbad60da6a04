"""The keys of a run reach the settings of Megatron-Bridge."""

import pytest

from luthier.config.load import load_train
from luthier.core.errors import InvalidInput
from luthier.core.machine import detect
from luthier.training.arguments import training_arguments
from luthier.workflow.megatron.bridge_config import configuration, padded_block
from tests import bridge_library

BASE = {"model_name_or_path": "m", "dataset": "d", "do_train": True, "finetuning_type": "full"}
LIBRARY = vars(bridge_library)


@pytest.fixture
def configured(monkeypatch, tmp_path):
    monkeypatch.setenv("USE_MEGATRON_BRIDGE", "1")

    def configure(num_evaluated=0, **keys):
        run = load_train({**BASE, "output_dir": str(tmp_path), **keys})
        args = training_arguments(run, detect())
        bridge = bridge_library.AutoBridge()
        return configuration(run, args, LIBRARY, bridge, "folder", num_rows=10, num_evaluated=num_evaluated)

    return configure


def test_the_schedule_and_the_optimizer(configured):
    keys = {"learning_rate": 3e-4, "lr_scheduler_type": "cosine", "weight_decay": 0.1, "adam_beta2": 0.95}
    keys |= {"max_grad_norm": 0.5, "seed": 3, "bf16": False, "logging_steps": 2}
    found = configured(
        **keys, per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=2, warmup_ratio=0.5
    )
    assert (found.train.train_iters, found.train.global_batch_size, found.train.micro_batch_size) == (5, 4, 2)
    options = found.optimizer
    assert (options.lr, options.min_lr, options.weight_decay, options.clip_grad) == (3e-4, 0.0, 0.1, 0.5)
    assert (options.adam_beta2, options.use_distributed_optimizer) == (0.95, True)
    schedule = found.scheduler
    assert (schedule.lr_decay_style, schedule.lr_warmup_iters, schedule.lr_decay_iters) == ("cosine", 3, 5)
    assert (found.rng.seed, found.logger.log_interval, found.mixed_precision, found.peft) == (3, 2, "bf16_mixed", None)
    assert (found.checkpoint.pretrained_checkpoint, found.tokenizer.tokenizer_model) == ("folder", "folder")


def test_a_warm_up_beyond_the_last_step_is_kept(configured):
    schedule = configured(max_steps=3, warmup_steps=10).scheduler
    assert (schedule.lr_warmup_iters, schedule.lr_decay_iters) == (10, 11)


def test_the_model_gets_the_keys_that_are_written(configured):
    keys = {"tensor_model_parallel_size": 1, "recompute_granularity": "full", "moe_token_dispatcher_type": "alltoall"}
    model = configured(**keys, masked_softmax_fusion=False, cutoff_len=100).model
    assert {name: getattr(model, name) for name in keys} == keys
    assert (model.masked_softmax_fusion, model.seq_length, model.calculate_per_token_loss) == (False, 128, False)
    assert configured().model.masked_softmax_fusion, "what the user has not written is the default of the library"
    with pytest.raises(InvalidInput, match="bias_activation_fusion: the model has no such setting"):
        configured(bias_activation_fusion=True)


def test_parts_of_a_row_divide_by_all_its_tokens(configured, monkeypatch):
    import luthier.workflow.megatron.bridge_config as module

    monkeypatch.setattr(module, "model_parallel_size", lambda keys: 1)
    assert configured(context_parallel_size=2).model.calculate_per_token_loss


def test_the_whole_evaluation_set_is_used(configured):
    steps = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 4, "val_size": 0.5}
    checks = configured(num_evaluated=10, **steps).validation
    found = (checks.eval_iters, checks.eval_interval, checks.eval_global_batch_size, checks.eval_micro_batch_size)
    assert found == (3, 3, 4, 4)
    checks = configured(num_evaluated=10, eval_strategy="epoch", per_device_train_batch_size=4, val_size=0.5).validation
    assert checks.eval_interval == 3
    checks = configured(num_evaluated=10, do_eval=True, val_size=0.5).validation
    assert (checks.eval_iters, checks.eval_interval) == (2, None)
    assert configured(num_evaluated=10, val_size=0.5).validation.eval_iters == 0


def test_checkpoints(configured, tmp_path):
    found = configured(save_steps=7, save_total_limit=2, save_only_model=True).checkpoint
    assert (found.save, found.save_interval, found.most_recent_k) == (str(tmp_path / "checkpoint-megatron"), 7, 2)
    assert not found.save_optim and not found.save_rng and not found.load_optim
    assert configured(save_strategy="no").checkpoint.save is None
    found = configured(save_strategy="epoch", per_device_train_batch_size=4, megatron_pretrained_checkpoint="mine")
    assert (found.checkpoint.save_interval, found.checkpoint.pretrained_checkpoint) == (3, "mine")


def test_an_adapter(configured):
    peft = configured(finetuning_type="lora", lora_rank=4, lora_dropout=0.1).peft
    assert (peft.dim, peft.alpha, peft.dropout) == (4, 8, 0.1)
    assert peft.target_modules == ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


def test_only_the_distributed_optimizer_fetches_weights(configured):
    found = configured(use_distributed_optimizer=False)
    assert not found.ddp.overlap_param_gather and not found.optimizer.overlap_param_gather
    assert found.ddp.overlap_grad_reduce and not found.checkpoint.dist_ckpt_optim_fully_reshardable


def test_more_settings(configured):
    found = configured(extra_config='{"train.train_iters": 5, "model.qk_layernorm": true}')
    assert found.train.train_iters == 5 and found.model.qk_layernorm
    for path in ("train.no_such", "no.such", "dataset.num_workers"):
        with pytest.raises(InvalidInput, match=f"extra_config: {path}: the ConfigContainer"):
            configured(extra_config={path: 1})
    with pytest.raises(InvalidInput, match="extra_config: train: holds several settings"):
        configured(extra_config={"train": {"manual_gc": True}})


def test_rows_have_one_length_where_devices_exchange_them(monkeypatch):
    monkeypatch.setenv("USE_MEGATRON_BRIDGE", "1")
    run = {**BASE, "output_dir": "o", "cutoff_len": 1000}
    assert padded_block(load_train(run)) == 64
    assert padded_block(load_train({**run, "pipeline_model_parallel_size": 2})) == 1024
