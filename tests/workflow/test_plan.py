"""The plan's figures are those of the real run, and its decisions follow the free memory."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import luthier
from luthier.config.keys.parallel import ParallelConfig
from luthier.config.load import load_train
from luthier.core.errors import InvalidInput
from luthier.data.rows.labels import IGNORE_INDEX
from luthier.model.checkpointing import enable_checkpointing
from luthier.model.loading.config import load_config
from luthier.model.modules import unwrap
from luthier.training.trainer import StageTrainer
from luthier.workflow.plan import duration as duration_module
from luthier.workflow.plan import room, trace, traces
from luthier.workflow.plan.calls import Call, Calls, Product
from luthier.workflow.plan.counter import StepCounter
from luthier.workflow.plan.duration import Speed, basis_of, measured_speed, product_seconds
from luthier.workflow.plan.engine import Engine
from luthier.workflow.plan.foresight import Foresight, comparison, may_be_short, require_fit
from luthier.workflow.plan.make import Traces, make_plan
from luthier.workflow.plan.memory import Held, num_checkpoints
from luthier.workflow.plan.recompute import as_asked, decide
from luthier.workflow.plan.shape import Unplanned, build_shape, layers_are_alike
from luthier.workflow.plan.text import as_json, duration, lines_of
from luthier.workflow.plan.trace import Batch, Trace, trace_step
from tests.matrix import representatives
from tests.plans import plan_of, sides
from tests.small_world import WAYS, losses, small_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    values = small_world(tmp_path_factory.mktemp("world"), num_hidden_layers=6)
    return {**values, "max_steps": 2}


@pytest.fixture
def spied(monkeypatch):
    """What the trainer holds in its last step: parameters, gradients and the state of its optimizer."""
    found = {"batches": []}
    build, loss = StageTrainer.create_optimizer, StageTrainer.compute_loss

    def create_optimizer(self, model=None):
        optimizer = build(self, model)

        def note(optimizer, args, kwargs):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            found["gradients"] = sum(weight.grad.nbytes for weight in weights if weight.grad is not None)

        def note_after(optimizer, args, kwargs):
            states = [value for state in optimizer.state.values() for value in state.values()]
            found["optimizer"] = sum(value.nbytes for value in states if value.ndim)

        optimizer.register_step_pre_hook(note)
        optimizer.register_step_post_hook(note_after)
        found["policy"] = self.policy
        return optimizer

    def compute_loss(self, model, inputs, *args, **kwargs):
        found["batches"].append((inputs["input_ids"].numel(), inputs["targets"].numel()))
        return loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "create_optimizer", create_optimizer)
    monkeypatch.setattr(StageTrainer, "compute_loss", compute_loss)
    return found


COUNTED = {
    "full": WAYS["full"],
    "freeze": WAYS["freeze"],
    "dora": {**WAYS["lora"], "use_dora": True, "disable_shuffling": False},
    "dpo": {**WAYS["lora"], "stage": "dpo", "dataset": "pairs"},
    "rm": {**WAYS["lora"], "stage": "rm", "dataset": "pairs"},
    "bf16": {**WAYS["full"], "bf16": True, "gradient_accumulation_steps": 2},
    "mixture of depths": {**WAYS["full"], "mixture_of_depths": "convert"},
}


@pytest.mark.parametrize("name", representatives(COUNTED, "dpo", "mixture of depths"))
def test_counted_tensors_are_those_of_the_run(world, spied, tmp_path, name):
    values = {**world, **COUNTED[name], "output_dir": str(tmp_path / "out")}
    plan = plan_of(values)
    luthier.train(values)
    policy = spied["policy"]
    assert plan.parameters == sum(weight.numel() for weight in policy.parameters())
    assert plan.trainable_parameters == sum(weight.numel() for weight in policy.parameters() if weight.requires_grad)
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*policy.parameters(), *policy.buffers())}
    assert plan.held.weights_bytes == sum(tensors.values())
    assert plan.held.gradients_bytes == spied["gradients"]
    assert plan.held.optimizer_bytes == spied["optimizer"]
    assert sum(pattern.parameters for pattern in plan.patterns) == plan.parameters
    largest = max(tokens for tokens, _ in spied["batches"])
    assert plan.work.heaviest.num_tokens == largest
    assert plan.work.heaviest.num_targets in {targets for tokens, targets in spied["batches"] if tokens == largest}
    if plan.work.heaviest.prefixes is None:  # a shared prompt is computed once, and counted with each answer
        assert plan.work.tokens == sum(tokens for tokens, _ in spied["batches"])
    assert plan.work.steps == 2


def test_quantized_weights_are_counted_in_their_bits(world):
    whole, quantized = (plan_of({**world, **WAYS[name]}) for name in ("lora", "qlora"))
    linear = 6 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    saved = whole.held.weights_bytes - quantized.held.weights_bytes
    assert saved == linear * 4 - (linear // 2 + linear // 64)


@pytest.mark.parametrize(
    ("reads", "use_reentrant"), [("cross_entropy", None), ("logps", None), ("cross_entropy", True), ("logps", False)]
)
@pytest.mark.parametrize("way", ["lora", "full"])
def test_a_traced_step_holds_what_a_real_one_holds(world, reads, use_reentrant, way):
    """With all activations kept, and with layers computed again in both ways of PyTorch."""
    run, stage, text, _, machine = sides({**world, **WAYS[way]})
    shape = build_shape(run, stage, text, load_config(text.source), machine)
    if use_reentrant is not None:
        enable_checkpointing(unwrap(shape.model), use_reentrant=use_reentrant)
    batch = Batch((30, 50), 40)
    planned = trace_step(shape.model, batch, reads=reads, half=None)
    real = shape.model.to_empty(device="cpu")
    for tensor in (*real.parameters(), *real.buffers()):
        torch.nn.init.constant_(tensor, 0.01)
    counter = StepCounter(real)
    counter.known = {tensor.untyped_storage()._cdata for tensor in (*real.parameters(), *real.buffers())}
    ids = torch.arange(80)[None]
    bounds = torch.tensor([0, 30, 80], dtype=torch.int32)
    inputs = {"input_ids": ids, "position_ids": torch.cat([torch.arange(30), torch.arange(50)])[None]}
    inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 50, "max_length_k": 50}
    positions = torch.arange(40)
    with pytest.MonkeyPatch.context() as patch, counter:
        patch.setattr(trace, "_positions", lambda batch: positions)
        patch.setattr(counter, "__class__", _OnRealTensors)
        trace._LOSSES[reads](real, trace._head_of(real), inputs, batch).backward()
    assert planned.peak_bytes == pytest.approx(max(counter.history), rel=0.03)
    actual = trace.Trace(0, 0, 0, counter.calls)
    assert planned.num_operations == pytest.approx(actual.num_operations, rel=0.01)
    assert moved(planned.calls) == pytest.approx(moved(actual.calls), rel=0.03)


def test_an_accelerator_attends_in_16_bits_and_holds_less_than_a_cpu(world):
    """A CPU attends in float32, and has copies of what it is given in the meantime."""
    run, stage, text, _, machine = sides({**world, **WAYS["lora"], "bf16": True})
    shape = build_shape(run, stage, text, load_config(text.source), machine)
    batch, half = Batch((300, 500), 4), torch.bfloat16
    on_cpu, on_device = (
        trace_step(shape.model, batch, reads="cross_entropy", half=half, on_device=there) for there in (False, True)
    )
    assert on_device.peak_bytes < on_cpu.peak_bytes < 1.1 * on_device.peak_bytes
    assert on_device.num_operations == on_cpu.num_operations


def moved(calls: Calls) -> float:
    return sum(call.num_bytes * count for call, count in calls.items())


def test_the_bytes_of_an_operation_are_those_it_reads_and_writes():
    """A view moves none, and looking up rows of a table does not read the table."""
    table, ids = torch.empty(1000, 8, device="meta"), torch.empty(5, dtype=torch.long, device="meta")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=8, num_hidden_layers=0, num_attention_heads=1, vocab_size=9))
    counter = StepCounter(model)
    with counter:
        rows = torch.nn.functional.embedding(ids, table)
        (rows.view(40) + 1.0).add_(rows.view(40))
        rows @ rows.T
    assert counter.calls == {
        Call(0, 2 * 160): 1 + 1,  # the rows; the sum with a number
        Call(0, 3 * 160): 1,  # in place: reads two and writes one of them
        Call(2 * 5 * 5 * 8, 160 + 160 + 100, Product(5, 8, 5, False, True, torch.float32)): 1,
    }


class _OnRealTensors(StepCounter):
    """Asks tensors for their numbers, which exist."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (trace.aten._local_scalar_dense.default, trace.aten._unique2.default):
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_a_long_model_follows_from_two_short_ones(world):
    run, stage, text, data, machine = sides({**world, **WAYS["lora"]})
    config = load_config(text.source)
    shape = build_shape(run, stage, text, config, machine)
    plan = make_plan(run, stage, text, data, machine)
    assert layers_are_alike(shape, config)
    assert plan.traces.kept == trace_step(shape.model, plan.work.heaviest, reads=stage.reads, half=None)


def test_layers_of_which_some_are_trained_are_not_alike(world):
    run, stage, text, _, machine = sides({**world, **WAYS["freeze"]})
    config = load_config(text.source)
    assert not layers_are_alike(build_shape(run, stage, text, config, machine), config)


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing(world):
    keys = {**world, "fast_path": False}  # rows that share no tokens
    one, four = (plan_of({**keys, "per_device_train_batch_size": size}) for size in (1, 4))
    assert 3 < four.traces.kept.early_bytes / one.traces.kept.early_bytes < 5
    assert four.traces.recomputed.peak_bytes < four.traces.kept.peak_bytes / 2
    assert four.traces.at(0) == four.traces.kept
    assert four.traces.at(3).peak_bytes < four.traces.kept.peak_bytes


def test_layers_that_are_computed_again_hold_no_scores_of_all_tokens(world):
    run, stage, text, _, machine = sides({**world, **WAYS["full"]})
    shape, batch = build_shape(run, stage, text, load_config(text.source), machine), Batch((4096,), 16)
    kept = trace_step(shape.model, batch, reads="cross_entropy", half=None)
    enable_checkpointing(shape.model, use_reentrant=True)
    again = trace_step(shape.model, batch, reads="cross_entropy", half=None)
    num_heads, float32_bytes = 4, 4
    assert again.peak_bytes < min(kept.peak_bytes / 2, num_heads * 4096**2 * float32_bytes)


@pytest.mark.parametrize(
    ("keys", "engine", "expected"),
    [
        ({}, Engine("one process"), True),
        ({}, Engine("zero3", 2), True),
        ({}, Engine("fsdp2", 2), False),
        ({"use_reentrant_gc": False}, Engine("ddp", 2), False),
        ({"use_unsloth_gc": True}, Engine("ddp", 2), True),
    ],
)
def test_layers_are_computed_again_in_the_way_of_the_run(world, monkeypatch, keys, engine, expected):
    ways = []
    real = traces.enable_checkpointing
    monkeypatch.setattr(traces, "enable_checkpointing", lambda *args, **how: ways.append(how) or real(*args, **how))
    run, stage, text, data, machine = sides({**world, **WAYS["lora"], **keys})
    plan = make_plan(run, stage, text, data, replace(machine, world_size=engine.num_processes), engine)
    assert plan.traces.recomputed.num_operations > plan.traces.kept.num_operations
    assert ways and all(how == {"use_reentrant": expected} for how in ways)


def test_recomputation_is_traced_once_something_asks_for_it(world, monkeypatch):
    """Each trace of six layers is that of two and that of four. One more is that with bf16."""
    traced = []
    real = traces.trace_step
    monkeypatch.setattr(traces, "trace_step", lambda *args, **more: traced.append(1) or real(*args, **more))
    plan = plan_of({**world, **WAYS["lora"]})
    assert plan.recompute.num_layers == 0 and len(traced) == 2
    assert plan.what_if and plan.what_if and len(traced) == 6


def falling(count):
    """10 layers: 100 GB without recomputation, 5 GB less for each layer computed again."""
    return (100 - 5 * count) * 10**9


@pytest.mark.parametrize(
    ("available_gb", "num_layers", "words"),
    [
        (200, 0, "no layer is computed again"),
        (120, 2, "the first 2 of 10 layers"),
        (80, 8, "the first 8 of 10 layers"),
        (60, None, "all layers are computed again"),
        (None, None, "does not say"),
    ],
)
def test_the_free_memory_decides_how_many_layers_are_computed_again(available_gb, num_layers, words):
    available = None if available_gb is None else available_gb * 10**9
    found = decide(10, falling, available)
    assert found.num_layers == num_layers and words in found.reason
    if num_layers:
        assert falling(num_layers) <= 0.75 * available < falling(num_layers - 1)


def test_on_an_accelerator_more_room_is_left():
    assert decide(10, falling, 150 * 10**9).num_layers == 0
    assert decide(10, falling, 150 * 10**9, "cuda").num_layers == 5


@pytest.mark.parametrize(
    "keys", [{"disable_gradient_checkpointing": False}, {"checkpoint_every": 2}, {"use_reentrant_gc": False}]
)
def test_a_key_that_is_given_decides(world, keys):
    found = as_asked(load_train({**world, **keys}))
    assert found is not None and found.num_layers is None and next(iter(keys)) in found.reason
    assert as_asked(load_train(world)) is None


@pytest.mark.thorough
def test_the_decision_changes_no_loss_and_may_change_in_a_resumed_run(world, tmp_path, monkeypatch):
    values = {**world, **WAYS["lora"], "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    found = {}
    for name, free in (("much", 10**15), ("little", 3 * 10**8)):
        monkeypatch.setattr(room, "available_memory_bytes", lambda free=free: free)
        monkeypatch.setattr(room, "resident_bytes", lambda: 0)
        result = luthier.train({**values, "output_dir": str(tmp_path / name), "skip_memory_check": True})
        found[name] = losses(result)
        is_kept = "no layer is computed again" in result.compared["gradient_checkpointing"]
        assert is_kept == (name == "much") or name == "little"
    assert found["much"] == found["little"]
    keys = {**values, "overwrite_output_dir": False, "resume_from_checkpoint": str(tmp_path / "much" / "checkpoint-2")}
    monkeypatch.setattr(room, "available_memory_bytes", lambda: 0)
    resumed = luthier.train({**keys, "output_dir": str(tmp_path / "resumed"), "skip_memory_check": True})
    assert "all layers are computed again" in resumed.compared["gradient_checkpointing"]
    assert losses(resumed)[-2:] == pytest.approx(found["much"][-2:], abs=1e-6)


def test_a_mixture_of_depths_that_is_loaded_is_planned_as_it_was_converted(world, tmp_path):
    """A block with a router computes an eighth of the tokens, so a step takes less than that of the dense model."""
    keys = {**world, **WAYS["full"], "max_steps": 1, "disable_gradient_checkpointing": True}
    converting = {**keys, "mixture_of_depths": "convert", "output_dir": str(tmp_path / "out")}
    dense, converted = plan_of(keys), plan_of(converting)
    luthier.train(converting)
    loaded = plan_of({**keys, "mixture_of_depths": "load", "model_name_or_path": str(tmp_path / "out")})
    assert loaded.held.weights_bytes == converted.held.weights_bytes > dense.held.weights_bytes
    assert loaded.trace.peak_bytes == pytest.approx(converted.trace.peak_bytes, rel=1e-3)
    assert converted.trace.num_operations < dense.trace.num_operations
    assert converted.trace.early_bytes < dense.trace.early_bytes


HELD = Held(10**9, 4 * 10**9, 4 * 10**9, 8 * 10**9, 0, 0, 10**8)


def of_memory(plan, available_bytes, held=HELD):
    return replace(plan, held=held, available_bytes=available_bytes)


def test_what_cannot_fit_is_refused_with_remedies(world):
    plan = plan_of(world)
    assert HELD.least_bytes == 17 * 10**9
    with pytest.raises(InvalidInput, match=r"17\.000 GB are weights.*skip_memory_check: true") as refusal:
        require_fit(of_memory(plan, 16 * 10**9), "cpu")
    assert refusal.value.exit_status == 2 and "per_device_train_batch_size: 1" in str(refusal.value)
    require_fit(of_memory(plan, 18 * 10**9), "cpu")
    require_fit(of_memory(plan, None), "cpu")


def test_a_planned_peak_is_refused_only_beyond_its_error(world):
    plan = of_memory(plan_of(world), 90 * 10**9)
    large = Trace(83 * 10**9, 0, 0, {})
    above = replace(plan, traces=Traces(replace(large, early_bytes=93 * 10**9), lambda: large, 6), num_recomputed=0)
    require_fit(replace(above, traces=Traces(large, lambda: large, 6)), "cpu")
    with pytest.raises(InvalidInput, match=r"106\.000 GB of memory"):
        require_fit(replace(above, available_bytes=90 * 10**9), "cpu")
    require_fit(above, "cuda")


def test_freed_memory_is_given_back_where_memory_may_be_short(world):
    plan = plan_of({**world, **WAYS["lora"]})
    short, long = (replace(plan, available_bytes=round(share * plan.peak_bytes)) for share in (1.3, 1.5))
    assert may_be_short(short, "cpu") and not may_be_short(long, "cpu")
    assert not may_be_short(replace(plan, available_bytes=None), "cpu") and not may_be_short(short, "cuda")


def test_train_refuses_before_weights_are_loaded_unless_told_otherwise(world, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "_available_bytes", lambda machine, own: 10**6)
    values = {**world, "output_dir": str(tmp_path / "out")}
    with pytest.raises(InvalidInput, match="this run needs"):
        luthier.train(values)
    assert len(losses(luthier.train({**values, "skip_memory_check": True}))) == 2


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"torch_compile": True}, "kernels"),
        ({"sp_size": 3}, "4 attention heads cannot be shared equally"),
        ({"tp_size": 3}, "3 processes cannot have equal parts of its num_attention_heads"),
        ({"deepspeed": {"zero_optimization": {"stage": 4}}}, "no ZeRO stage 4"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "FSDP 1"),
        ({"fsdp": True, "fsdp_min_num_params": 100}, "a policy of its own"),
    ],
)
def test_what_has_no_model_of_its_memory_has_no_plan(world, keys, reason):
    run, *others = sides(world)
    run = replace(run, training=replace(run.training, given={**run.training.given, **keys}))
    if {"sp_size", "tp_size"} & keys.keys():
        run = replace(run, parallel=ParallelConfig(**keys))
    with pytest.raises(Unplanned, match=reason):
        make_plan(run, *others)


def test_json_and_lines_say_the_same(world):
    plan = plan_of({**world, "eval_strategy": "no"})
    found = as_json(plan)
    wanted = {"rows", "tokens", "steps", "trainable_parameters", "parameters", "peak_bytes", "seconds", "what_if"}
    assert wanted <= found.keys() and found["rows"] == 24 and found["peak_bytes"] == plan.peak_bytes
    text = "\n".join(lines_of(plan))
    for words in (
        "24 rows",
        "2 steps",
        "model.layers.*.mlp.down_proj.weight",
        "flash_attn: sdpa",
        "GFLOP/s",
        "what if",
    ):
        assert words in text
    peaks = [remedy.peak_bytes for remedy in plan.what_if]
    assert peaks and all(peak < plan.peak_bytes for peak in peaks)


def test_sampled_answers_have_a_cache(world):
    keys = {
        **world,
        "stage": "grpo",
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_new_tokens": 6,
        "reward_funcs": "tests.small_world:small_letters",
    }
    plan = plan_of(keys)
    prompts = [row["labels"].count(IGNORE_INDEX) for row in sides(keys)[3].train]
    longest = max(plan.work.heaviest.lengths)
    assert longest == max(prompts) + 6, "the answer of the dataset is not read"
    assert plan.held.cache_bytes == 2 * 6 * 2 * 16 * 4 * longest * 8


def test_time_rests_on_the_speed_of_this_machine():
    speed = measured_speed(torch.float32, "cpu", 64)
    assert measured_speed(torch.float32, "cpu", 64) == speed
    assert speed.operations > 1e6 and speed.num_bytes > 1e6
    assert "measured here" in basis_of({Call(10**12, 10**9): 2}, speed, torch.float32)


def test_an_operation_takes_as_long_as_its_products_or_its_memory():
    speed = Speed(operations=100, num_bytes=10, call_seconds=1)
    assert speed.seconds_for({Call(200, 5): 1}) == 2 + 1
    assert speed.seconds_for({Call(200, 50): 3, Call(0, 1): 2}) == 3 * (5 + 1) + 2 * (0.1 + 1)


def test_products_with_a_short_side_are_timed_in_their_own_shapes(monkeypatch):
    timed = []
    monkeypatch.setattr(duration_module, "product_seconds", lambda product: timed.append(product) or 7.0)
    small, square, large = (Product(rows, 10**3, 10**3, False, True, torch.float32) for rows in (1, 10**3, 10**4))
    calls = {Call(2 * 10**6, 0, small): 2, Call(2 * 10**9, 0, square): 5, Call(2 * 10**10, 0, large): 1}
    speed = Speed(operations=10**10, num_bytes=1, call_seconds=0, times_products=True)
    assert speed.seconds_for(calls) == 2 * 7.0 + 5 * 0.2 + 2 and timed == [small]
    assert 0 < product_seconds(small) < 60
    assert [duration(seconds) for seconds in (12, 180, 9000)] == ["12 s", "3 min", "2.5 h"]


def test_kept_checkpoints_are_counted(world):
    keys = {"save_strategy": "steps", "save_steps": 3}
    assert num_checkpoints(load_train({**world, **keys}), 10) == 4
    assert num_checkpoints(load_train({**world, **keys, "save_total_limit": 2}), 10) == 2
    assert num_checkpoints(load_train(world), 10) == 0


def test_the_report_ends_with_planned_and_actual(world, tmp_path):
    result = luthier.train({**world, "output_dir": str(tmp_path / "out")})
    first, second = comparison(result.compared)
    assert first.startswith("peak memory: ") and "planned)" in first and second.startswith("training time: ")
    assert comparison(Foresight(as_asked(load_train({**world, "checkpoint_every": 1}))).compared(None))[0].endswith("B")


def test_what_a_reference_scores_before_training_is_planned(world):
    """Eight pairs at a time, without gradients, while a step trains on one."""
    keys = {**world, **WAYS["lora"], "stage": "dpo", "dataset": "pairs", "per_device_train_batch_size": 1}
    plan, one = plan_of(keys), plan_of({**keys, "per_device_eval_batch_size": 1})
    assert plan.work.scored is not None and plan.work.scored.num_tokens > 4 * plan.work.heaviest.num_tokens
    assert plan.work.evaluated is None and plan.held.evaluating_bytes == 0
    assert one.held.scoring_bytes < plan.held.scoring_bytes / 4
    scoring = plan.held.libraries_bytes + plan.held.weights_bytes + plan.held.scoring_bytes
    assert plan.peak_bytes >= scoring * (1 + plan.held.margin_share) - 1
    named = plan_of({**keys, "ref_model": world["model_name_or_path"]})
    assert named.held.scoring_bytes == plan.held.scoring_bytes + plan.held.weights_bytes
    assert plan_of({**world, "per_device_train_batch_size": 1}).held.scoring_bytes == 0


def test_an_evaluation_is_planned(world):
    keys = {**world, "val_size": 0.5, "eval_strategy": "epoch", "per_device_train_batch_size": 1}
    small, large = (plan_of({**keys, "per_device_eval_batch_size": size}) for size in (1, 12))
    assert large.work.evaluated is not None and small.work.evaluated is not None
    assert large.work.evaluated.num_tokens > 4 * small.work.evaluated.num_tokens
    assert large.held.evaluating_bytes > 2 * small.held.evaluating_bytes > 0
    assert large.peak_bytes >= (large.held.all_bytes + large.held.evaluating_bytes) * (1 + large.held.margin_share) - 1
    assert plan_of({**keys, "eval_strategy": "no"}).held.evaluating_bytes == 0
