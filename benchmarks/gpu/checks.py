"""The groups of checks. Each yields its results one by one; `run_group` turns errors into results.

A check trains one or a few steps and compares: the loss with that of the reference by hand (padded rows, sdpa, logits
at every position; `benchmarks/goals/reference.py`), the peak memory with the plan, the speed with the reference.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.goals import inputs, reference
from benchmarks.gpu import results
from benchmarks.gpu.results import Check
from benchmarks.gpu.world import Done, StepClock, World, fresh_memory, peak_gigabytes, step_seconds, train

AGREE, AGREE_CLOSELY = 2e-2, 1e-3
"""The most by which losses in bfloat16 may differ from each other, relative to the loss. Random weights predict
nothing, so that attention across samples changes the mean loss of a batch by a few thousandths only."""
ATTENTION_STEPS = 4
SPEED_STEPS = 8
PROGRAMS = ("luthier", "reference", "luthier with torch_compile")
LIBRARIES = {"fa2": "flash_attn", "bnb": "bitsandbytes", "hqq": "hqq"}


def run_group(group: str, world: World, file: Path) -> None:
    """Run the checks of this group and append each result to `file` as soon as it is there."""
    world.make()
    for name, check in GROUPS[group](world):
        try:
            found = check()
        except Exception as error:  # whatever a kernel or a library raises is the result of this check
            first = (str(error).splitlines() or [""])[0]
            found = Check(group, name, "failed", remark=f"{type(error).__name__}: {first}")
        results.append(file, found)


Named = Iterator[tuple[str, Callable[[], Check]]]


def memory_figures(done: Done) -> dict[str, float]:
    """Measured and planned peak in GB, and their ratio."""
    measured, planned = done.compared.get("peak_bytes"), done.compared.get("planned_peak_bytes")
    if not measured or not planned:
        return {}
    return {"peak GB": measured / 1e9, "planned GB": planned / 1e9, "planned/measured": planned / measured}


def verdict(
    group: str,
    name: str,
    losses: list[float],
    figures: Mapping[str, float],
    expected: Sequence[float] = (),
    agree: float = AGREE,
) -> Check:
    """`expected`: what the first losses should be about."""
    found = {"loss": losses[0], **figures}
    if not all(map(math.isfinite, losses)):
        return Check(group, name, "failed", found, "the loss is not finite")
    if expected:
        pairs = list(zip(losses, expected, strict=False))
        found |= {"expected": expected[0], "worst difference": max(abs(loss - other) for loss, other in pairs)}
        if any(abs(loss - other) > agree * max(abs(other), 1) for loss, other in pairs):
            return Check(group, name, "failed", found, "the loss differs from the expected one")
    return Check(group, name, "ok", found)


def lacking(kind: str) -> str | None:
    """Why a check that needs the library of `kind` is skipped."""
    library = LIBRARIES.get(kind)
    return f"the library {library} is not installed" if library and find_spec(library) is None else None


# -- every stage, one step ---------------------------------------------------------------------------


def stage_keys(world: World) -> dict[str, dict[str, Any]]:
    pairs, rollout = (
        {"dataset": "pairs"},
        {"max_new_tokens": 16, "reward_funcs": f"{world.folder}/rewards.py:small_letters"},
    )
    return {
        "pt": {"dataset": "texts", "max_samples": inputs.NUM_ROWS},
        "sft": {},
        "rm": pairs,
        "dpo": pairs,
        "kto": {"dataset": "feedback"},
        "ppo": rollout,
        "grpo": {**rollout, "num_generations": 2},
        "gkd": {"teacher_model": str(world.model)},
    }


def stages(world: World) -> Named:
    for stage, changes in stage_keys(world).items():

        def check(stage: str = stage, changes: Mapping[str, Any] = changes) -> Check:
            done = train(world, world.keys(stage=stage, **changes))
            return verdict("stages", stage, done.losses, {"s": done.seconds, **memory_figures(done)})

        yield stage, check


# -- attention without padding against padded rows -----------------------------------------------------


def expected_losses(world: World, **changes: Any) -> list[float]:
    """The losses of the reference on the same rows."""
    keys = world.keys(**changes)
    rows = inputs.read_rows(inputs.token_rows(keys, world.folder))
    fresh_memory()
    trainer = reference.train(keys, rows, checkpointing=True)
    return [float(logs["loss"]) for logs in trainer.state.log_history if "loss" in logs]


def against_reference(
    world: World, group: str, name: str, kind: str, expected: Callable[[], list[float]], agree: float, **keys: Any
) -> Check:
    reason = lacking(kind)
    if reason:
        return Check(group, name, "skipped", remark=reason)
    done = train(world, world.keys(**keys))
    if done.unavailable:
        return Check(group, name, "skipped", remark="; ".join(done.unavailable.values()))
    return verdict(group, name, done.losses, {"s": done.seconds, **memory_figures(done)}, expected(), agree)


def once(compute: Callable[[], list[float]]) -> Callable[[], list[float]]:
    """Computed when it is first asked for."""
    kept: list[float] = []

    def value() -> list[float]:
        if not kept:
            kept.extend(compute())
        return kept

    return value


def attention(world: World) -> Named:
    steps = {"max_steps": ATTENTION_STEPS}
    expected = once(lambda: expected_losses(world, **steps))
    for kind in ("sdpa", "fa2", "flex"):
        name = f"{kind}, rows without padding, against padded rows"

        def check(kind: str = kind, name: str = name) -> Check:
            return against_reference(world, "attention", name, kind, expected, AGREE_CLOSELY, flash_attn=kind, **steps)

        yield name, check


# -- 4 bits, fused kernels -----------------------------------------------------------------------------


def quantized(world: World) -> Named:
    methods: dict[str, dict[str, Any]] = {
        "bnb": {"quantization_bit": 4, "double_quantization": True},
        "hqq": {"quantization_bit": 4, "quantization_method": "hqq"},
    }
    for kind, keys in methods.items():
        name = f"{kind}, 4 bits, against the reference"

        def check(kind: str = kind, name: str = name, keys: Mapping[str, Any] = keys) -> Check:
            return against_reference(
                world, "quantized", name, kind, lambda: expected_losses(world, **keys), AGREE, **keys
            )

        yield name, check


def kernels(world: World) -> Named:
    """The fast path against the plain one: same loss, and how much faster a step is."""
    for stage, changes in {"sft": {}, "dpo": {"dataset": "pairs"}}.items():

        def check(stage: str = stage, changes: Mapping[str, Any] = changes) -> Check:
            found = {}
            for fast_path in (False, True):
                keys = world.keys(stage=stage, fast_path=fast_path, max_steps=4, **changes)
                with StepClock() as clock:
                    done = train(world, keys)
                found[fast_path] = (done.losses, step_seconds(clock.seconds))
            (plain, plain_seconds), (fast, fast_seconds) = found[False], found[True]
            figures = {"plain s": plain_seconds, "fast s": fast_seconds, "times as fast": plain_seconds / fast_seconds}
            return verdict("kernels", f"{stage}, fast path against plain", fast, figures, plain[:1])

        yield f"{stage}, fast path against plain", check


# -- speed ---------------------------------------------------------------------------------------------


def speed(world: World) -> Named:
    """Packs of 4,096 tokens: tokens/s and MFU, luthier beside the reference on the same packs.

    A compiled model is measured on a GPU alone: on a CPU it would need a C++ compiler.
    """
    kinds: dict[str, dict[str, Any]] = {
        "lora": {"learning_rate": 1e-4},
        "full": {"finetuning_type": "full", "learning_rate": 1e-5},
    }
    for kind, keys in kinds.items():
        for program in PROGRAMS if world.device == "cuda" else PROGRAMS[:2]:
            name = f"{kind} sft, {world.pack_tokens:,} packed tokens, {program}"

            def check(program: str = program, name: str = name, keys: Mapping[str, Any] = keys) -> Check:
                return speed_of(world, program, name, keys)

            yield name, check


def speed_of(world: World, program: str, name: str, changes: Mapping[str, Any]) -> Check:
    steps = 2 if world.is_tiny else SPEED_STEPS
    packs = {"packing": True, "cutoff_len": world.pack_tokens, "per_device_train_batch_size": 1, "max_samples": 64}
    compiled = {"torch_compile": True} if program.endswith("torch_compile") else {}
    keys = world.keys(**{**packs, "max_steps": steps, **compiled, **changes})
    rows = inputs.read_rows(inputs.token_rows(keys, world.folder))
    fresh_memory()
    memory: dict[str, float] = {}
    with StepClock() as clock:
        if program != "reference":
            done = train(world, keys)
            losses, memory = done.losses, memory_figures(done)
        else:
            whole = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
            trainer = reference.train(keys, whole, checkpointing=True)
            losses = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
            peak = peak_gigabytes()
            memory = {} if peak is None else {"peak GB": peak}
    full = [len(row["input_ids"]) for row in rows]
    rate = sum(full) / len(full) / step_seconds(clock.seconds)
    figures = {"tokens/s": rate, **utilization(world, keys, rate), **clock.profiled, **memory}
    return verdict("speed", name, losses, figures)


def utilization(world: World, keys: Mapping[str, Any], tokens_per_second: float) -> dict[str, float]:
    """Model FLOPs utilization, if the peak of the device is known. Attention within packs is not counted."""
    import torch

    from luthier.training.watch.gauges import peak_flops

    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if peak is None:
        return {}
    config = json.loads((world.model / "config.json").read_text(encoding="utf-8"))
    hidden, inner, layers = (config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    queries, pairs = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    weights = layers * (2 * hidden * queries + 2 * hidden * pairs + 3 * hidden * inner)
    weights += hidden * config["vocab_size"]
    per_weight = 6 if keys["finetuning_type"] == "full" else 4
    return {"MFU": per_weight * weights * tokens_per_second / peak}


GROUPS: dict[str, Callable[[World], Named]] = {
    "stages": stages,
    "attention": attention,
    "quantized": quantized,
    "kernels": kernels,
    "speed": speed,
}
