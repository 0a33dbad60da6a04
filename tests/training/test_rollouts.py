"""Training on sampled answers: whole runs of ppo and grpo on a tiny model."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

import luthier
from luthier.core.errors import ConfigError, InvalidInput, ModelError, RunFailed
from luthier.infer.batching import RowBatch
from luthier.stages._rollout import Rollout
from luthier.training.rollouts import Rollouts
from tests.matrix import representatives
from tests.small_world import WAYS, losses, small_world
from tests.tiny import tiny_llama

REWARDS = '''
def letters(completions):
    """The share of small letters."""
    return [sum(c.islower() for c in text) / max(len(text), 1) for text in completions]

def digits(completions, prompts, answers):
    assert all("Say the number" in prompt for prompt in prompts) and all("well" in answer for answer in answers)
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]

def raises(completions):
    raise KeyError("no such thing")

def nan(completions):
    return [0.0, float("nan")] * (len(completions) // 2)

def short(completions):
    return [1.0]

def word(completions):
    return "good"
'''


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("world")
    values = small_world(folder)
    (folder / "rewards.py").write_text(REWARDS, encoding="utf-8")
    return {
        **values,
        "cutoff_len": 100,
        "max_new_tokens": 6,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "finetuning_type": "lora",
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "constant",
        "reward_funcs": f"{folder}/rewards.py:letters",
    }


GRPO = {"stage": "grpo", "num_generations": 4}
LEARNS = {"finetuning_type": "full", "learning_rate": 3e-3, "per_device_train_batch_size": 64}
PPO = {"stage": "ppo", "ppo_epochs": 2}


@pytest.fixture(scope="module")
def reward_adapter(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rm") / "adapter"
    keys = {**world, "stage": "rm", "dataset": "pairs", "max_steps": 2, "reward_funcs": None}
    luthier.train({**keys, "output_dir": str(folder)})
    return folder


def log_of(values: dict[str, Any]) -> list[dict[str, Any]]:
    lines = Path(values["output_dir"], "trainer_log.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


@pytest.mark.thorough
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "gspo", "rloo"])
def test_grpo_raises_the_reward(values, loss_type):
    keys = {**LEARNS, "max_steps": 20, "num_generations": 16, "loss_type": loss_type}
    luthier.train({**values, **GRPO, **keys})
    rewards = [line["reward"] for line in log_of(values)]
    assert len(rewards) == 20 and sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1
    assert set(log_of(values)[0]) >= {"reward", "reward_spread", "answer_tokens", "finished_answers", "clip_fraction"}


@pytest.mark.thorough
def test_ppo_raises_the_reward_and_leaves_a_value_head(values):
    luthier.train({**values, **PPO, **LEARNS, "max_steps": 40})
    lines = log_of(values)
    rewards = [line["reward"] for line in lines if "reward" in line]
    assert len(rewards) == 20 and sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.05
    assert {"kl", "kl_coefficient", "policy_loss", "value_loss"} <= set(lines[0])
    out = Path(values["output_dir"])
    head = load_file(out / "value_head.safetensors")
    assert head["v_head.summary.weight"].shape == (1, 64) and head["v_head.summary.weight"].abs().sum() > 0
    (weights,) = [*out.glob("model.safetensors"), *out.glob("adapter_model.safetensors")]
    assert not any("value_head" in name for name in load_file(weights))


def test_the_first_pass_has_the_ratio_one(values):
    """Then the clipped loss of a batch is minus the mean advantage, which is 0 by construction for equal lengths."""
    keys = {**values, **GRPO, "learning_rate": 0.0, "max_steps": 2, "grpo_beta": 0.1}
    luthier.train(keys)
    for line in log_of(values):
        assert line["clip_fraction"] == 0 and abs(line["loss"]) < 1e-5 and abs(line["kl"]) < 1e-5


@pytest.mark.parametrize("loss_type", representatives(["grpo", "gspo", "rloo"], "grpo"))
def test_answers_used_once_need_no_extra_forward_pass(values, tmp_path, monkeypatch, loss_type):
    """They were sampled from the current policy: computing its log-probabilities first gives the same weights."""
    keys = {**values, **GRPO, "loss_type": loss_type, "max_steps": 3, "finetuning_type": "full", "learning_rate": 1e-3}
    keys |= {"reward_funcs": "tests.small_world:small_letters"}

    def trained(folder: Path) -> dict[str, torch.Tensor]:
        luthier.train({**keys, "output_dir": str(folder)})
        return load_file(folder / "model.safetensors")

    asked = []
    real = Rollouts._columns
    monkeypatch.setattr(Rollouts, "_columns", lambda *args: asked.append(1) or real(*args))
    found = trained(tmp_path / "unasked")
    assert not asked
    monkeypatch.setattr("luthier.stages.grpo.Rollout", lambda **plan: Rollout(**{**plan, "needs_policy_logps": True}))
    expected = trained(tmp_path / "asked")
    assert asked
    start = load_file(Path(values["model_name_or_path"], "model.safetensors"))
    assert any((found[name] - start[name]).abs().max() > 1e-4 for name in found)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


CUT = {
    "grpo": {**GRPO, "num_iterations": 2, "grpo_beta": 0.1},
    "ppo": {**PPO, "ppo_buffer_size": 2},
    "gkd": {"stage": "gkd", "gkd_lambda": 0.5, "reward_funcs": None},
}


@pytest.mark.parametrize("stage", representatives(CUT, "grpo"))
def test_a_step_does_not_depend_on_its_micro_batches(values, tmp_path, stage):
    if stage == "gkd":
        values["teacher_model"] = str(tiny_llama(tmp_path / "teacher", seed=7, max_position_embeddings=1024))

    def run(batch: int, accumulation: int) -> list[float]:
        keys = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 4}
        return losses(luthier.train({**values, **CUT[stage], **keys, "learning_rate": 1e-3}))

    whole = run(8, 1)
    assert any(abs(loss) > 1e-4 for loss in whole)
    for batch, accumulation in ((2, 4), (1, 8)):
        assert run(batch, accumulation) == pytest.approx(whole, abs=1e-5)


RESUMED = {
    **{f"grpo {way}": {**GRPO, **keys, "grpo_beta": 0.1} for way, keys in WAYS.items()},
    **{f"ppo {way}": {**PPO, **keys} for way, keys in WAYS.items()},
    "grpo inside a rollout": {**GRPO, "num_iterations": 3, "grpo_beta": 0.1},
    "grpo without a reference": GRPO,
    "ppo inside a rollout": {**PPO, "ppo_buffer_size": 3, "ppo_score_norm": True},
    "ppo with whitened rewards": {**PPO, "finetuning_type": "full", "ppo_whiten_rewards": True},
}


def rollouts_of(plan: Rollout, seed: int = 1, **args: int) -> Rollouts:
    """Those of a run of which only the numbers in `args` matter."""
    parts = dict.fromkeys(("config", "models", "collate", "generate", "decode", "rewards"))
    sizes = {"stop_ids": frozenset(), "temperature": 1.0, "max_new_tokens": 1}
    prompts = [{"input_ids": [1], "labels": [1]}] * 5
    return Rollouts(plan=plan, args=SimpleNamespace(seed=seed, **args), prompts=prompts, **parts, **sizes)


def test_the_steps_of_a_rollout_share_its_answers_in_each_pass():
    """Two steps of two batches of two rows: the first half, the second half, and in the second pass both again."""
    rollouts = rollouts_of(Rollout(num_batches=2, num_passes=2), train_batch_size=2)
    rollouts.collate = lambda rows: {"ids": [row["input_ids"] for row in rows]}
    rollouts.rows = [{"input_ids": number, "units": number, "columns": {}} for number in range(8)]
    steps = [rollouts.step(number, 2, {}) for number in (1, 2, 3)]
    first, second = [[0, 1], [2, 3]], [[4, 5], [6, 7]]
    assert [[batch["ids"] for batch in step.batches] for step in steps] == [second, first, second]
    assert [[batch["units"] for batch in step.batches] for step in steps] == [[9, 13], [1, 5], [9, 13]]


@pytest.mark.parametrize(
    ("plan", "args", "expected"),
    [
        (Rollout(), (2, 1, 1), 4),  # of 5 prompts, 2 steps of 2
        (Rollout(num_generations=4), (2, 2, 1), 20),  # of 20 answers, 5 steps of 4
        (Rollout(num_generations=4, num_passes=3), (2, 1, 4), 48),  # 2 steps of 8, three times
        (Rollout(), (8, 2, 1), 16),  # a step is larger than an epoch
    ],
)
def test_an_epoch_is_one_pass_over_the_prompts_in_whole_steps(plan, args, expected):
    names = ("train_batch_size", "gradient_accumulation_steps", "world_size")
    assert len(rollouts_of(plan, **dict(zip(names, args, strict=True))).step_rows) == expected


@pytest.mark.parametrize(("num_generations", "num_batches"), [(1, 1), (4, 1), (1, 3), (2, 2)])
def test_a_step_uses_the_same_prompts_on_any_number_of_processes(num_generations, num_batches):
    """Each step uses the next prompts once; each process uses its part of every step."""
    plan, seen = Rollout(num_generations=num_generations, num_batches=num_batches), []
    for number in range(3):
        for world_size in (1, 2, 4):
            steps: list[set[int]] = [set() for _ in range(num_batches)]
            for rank in range(world_size):
                cut = {"train_batch_size": 4 // world_size, "gradient_accumulation_steps": 4}
                places = rollouts_of(plan, **cut, world_size=world_size, process_index=rank).places(number)
                size = len(places) // num_batches
                for step, asked in enumerate(steps):
                    part = set(places[step * size : (step + 1) * size])
                    assert len(part) == size and not part & asked
                    asked |= part
            seen = seen + steps if world_size == 1 else seen
            assert steps == seen[-num_batches:]
    num_prompts = 16 // num_generations
    assert [sorted(step) for step in seen] == [
        list(range(start, start + num_prompts)) for start in range(0, num_prompts * len(seen), num_prompts)
    ]


@pytest.mark.parametrize("stage", [{**GRPO, "num_generations": 2}, PPO], ids=["grpo", "ppo"])
def test_answers_for_which_memory_is_out_are_generated_in_parts(values, tmp_path, monkeypatch, said, stage):
    keys = {**values, **stage, "max_steps": 2, "save_strategy": "no"}
    expected = losses(luthier.train(keys))
    step = RowBatch.step

    def limited(batch):
        if len(batch.rows) > 3:
            raise torch.OutOfMemoryError("out of memory: tried to allocate 2.00 GiB")
        step(batch)

    monkeypatch.setattr(RowBatch, "step", limited)
    assert losses(luthier.train({**keys, "output_dir": str(tmp_path / "short")})) == expected
    told = [line for line in said if "out of memory with" in line]
    assert [line.split()[5] for line in told] == ["8", "4"]


def test_every_answer_has_its_own_seed():
    """They depend on the seed of the run and the number of the answer in it, not on the process."""
    plan = Rollout(num_generations=4)
    seeds = rollouts_of(plan).answer_seeds(range(50))
    assert len(set(seeds)) == 200 and not set(seeds) & set(rollouts_of(plan, seed=2).answer_seeds(range(50)))
    assert rollouts_of(plan).answer_seeds([7, 3]) == seeds[28:32] + seeds[12:16]


@pytest.mark.parametrize("kind", representatives(RESUMED, "grpo lora", "ppo full", "ppo inside a rollout"))
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(values, tmp_path, kind):
    """Step 4 of 8 lies inside a rollout for some of these, and at its end for others."""
    if "quantization_bit" in RESUMED[kind]:
        pytest.importorskip("bitsandbytes")
    keys = {**values, **RESUMED[kind], "max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    keys |= {"overwrite_output_dir": False, "disable_shuffling": False, "learning_rate": 1e-3}
    whole = luthier.train(keys)
    out, again = Path(values["output_dir"]), tmp_path / "again"
    shutil.copytree(out / "checkpoint-4", again / "checkpoint-4")
    result = luthier.train({**keys, "output_dir": str(again)})
    assert losses(result) == losses(whole)
    for name in ("model.safetensors", "adapter_model.safetensors", "value_head.safetensors"):
        if (out / name).is_file():
            expected, found = load_file(out / name), load_file(again / name)
            assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_rewards_are_those_of_the_reward_model(values, reward_adapter):
    """An adapter on the same base, and base and adapter as a model of its own, give the same rewards."""
    keys = {**values, **PPO, "reward_funcs": None, "max_steps": 2, "learning_rate": 1e-4}
    lora = {"reward_model": str(reward_adapter)}
    full = {
        "reward_model": values["model_name_or_path"],
        "reward_model_type": "full",
        "reward_model_adapters": str(reward_adapter),
    }
    found = []
    for own in (lora, full):
        luthier.train({**keys, **own})
        found.append([line.get("reward") for line in log_of(values)])
    assert found[0] == found[1] and found[0][0] is not None


class Endpoint(BaseHTTPRequestHandler):
    replies: ClassVar[list[Any]] = []
    asked: ClassVar[list[Any]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Endpoint.asked.append(body)
        reply = Endpoint.replies.pop(0) if Endpoint.replies else None
        status = reply if isinstance(reply, int) else 200
        content = {"scores": [float(len(text)) for text in body["messages"]]} if reply is None else reply
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def endpoint():
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    Endpoint.replies, Endpoint.asked = [], []
    yield f"http://127.0.0.1:{server.server_port}/v1/score/evaluation"
    server.shutdown()


def test_a_server_scores_and_is_combined_with_a_function(values, endpoint, monkeypatch):
    monkeypatch.setattr("luthier.training.rewards.server.PAUSE_SECONDS", 0.0)
    Endpoint.replies = [503]
    own = {"reward_model": endpoint, "reward_model_type": "api", "reward_weights": "2.0,0.5", "max_steps": 1}
    luthier.train({**values, **GRPO, **own})
    assert len(Endpoint.asked) == 2 and len(Endpoint.asked[0]["messages"]) == 8
    assert Endpoint.asked[0]["messages"][0].startswith("<|im_start|>user\nSay the number")
    (line,) = log_of(values)
    parts = {name: value for name, value in line.items() if name.startswith("rewards/")}
    assert len(parts) == 2
    assert line["reward"] == pytest.approx(2 * parts["rewards/rewards.py:letters"] + 0.5 * parts["rewards/evaluation"])


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (404, "status 404"),
        ({"score": []}, 'has no "scores"'),
        ({"scores": [1.0]}, "returned 1 scores for 8 answers"),
        ({"scores": [None] * 8}, "the score of answer 0 is None"),
    ],
)
def test_a_bad_response_of_a_server_is_one_clear_error(values, endpoint, reply, reason):
    Endpoint.replies = [reply]
    own = {"reward_model": endpoint, "reward_model_type": "api", "reward_funcs": None}
    with pytest.raises(RunFailed, match=reason) as caught:
        luthier.train({**values, **PPO, **own})
    assert endpoint in str(caught.value)


def test_a_server_that_is_gone_or_slow_is_one_clear_error():
    from luthier.training.rewards.server import RewardServer

    with pytest.raises(RunFailed, match=r"no scores .*refused.*check the server"):
        RewardServer("http://127.0.0.1:9", pause_seconds=0.0)([])


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("raises", "raised KeyError: 'no such thing'"),
        ("nan", "the score of answer 1 is nan, not a finite number; prompt .*Say the number"),
        ("short", "it returned 1 scores for 8 answers"),
        ("word", "it returned a str"),
    ],
)
def test_a_bad_function_is_one_clear_error(values, function, reason):
    name = values["reward_funcs"].replace("letters", function)
    with pytest.raises(RunFailed, match=reason) as caught:
        luthier.train({**values, **GRPO, "reward_funcs": name})
    assert name in str(caught.value)


def test_functions_get_their_parameters_and_are_weighted(values):
    names = f"{values['reward_funcs']},{values['reward_funcs'].replace('letters', 'digits')}"
    luthier.train({**values, **GRPO, "reward_funcs": names, "reward_weights": "1.0,-2.0", "max_steps": 1})
    (line,) = log_of(values)
    assert line["reward"] == pytest.approx(
        line["rewards/rewards.py:letters"] - 2 * line["rewards/rewards.py:digits"], abs=1e-6
    )


def test_functions_that_cannot_be_found_are_named(values):
    for name, reason in (("nowhere.py:f", "there is no file"), ("json:nothing", "has no function nothing")):
        with pytest.raises(InvalidInput, match=reason):
            luthier.train({**values, **GRPO, "reward_funcs": name})


def test_a_reward_model_of_another_vocabulary_or_kind_is_refused(values, tmp_path):
    from tests.tiny import byte_tokenizer, tiny_llama

    other = tiny_llama(tmp_path / "other", tokenizer=byte_tokenizer(), vocab_size=320)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(other)
    own = {**PPO, "reward_model_type": "full", "reward_funcs": None}
    with pytest.raises(ModelError, match="is a language model without a reward head"):
        luthier.train({**values, **own, "reward_model": str(other)})


REFUSED = {
    "reward_model": {"reward_funcs": None},
    "do_eval": {"do_eval": True, "val_size": 0.1},
    "do_sample": {"do_sample": False},
    "num_beams": {"num_beams": 2},
    "reward_model_type": {"reward_model": "x", "finetuning_type": "full"},
    "ppo_epochs": {"ppo_epochs": 0},
    "packing": {"packing": True},
}


@pytest.mark.parametrize("key", REFUSED)
def test_incompatible_keys_are_refused(values, key):
    from luthier.config.load import load_train

    load_train({**values, **PPO})
    with pytest.raises(ConfigError, match=key):
        load_train({**values, **PPO, **REFUSED[key]})


def test_groups_must_be_whole(values):
    from luthier.config.load import load_train

    with pytest.raises(ConfigError, match="multiple of num_generations"):
        load_train({**values, **GRPO, "num_generations": 3})


def test_a_prompt_that_is_too_long_is_dropped_with_the_reason(values):
    luthier.train({**values, **GRPO, "cutoff_len": 36, "max_steps": 1})
    report = json.loads(Path(values["output_dir"], "data_report.json").read_text())
    account = report["datasets"]["numbers"]
    assert account["kept"] == 10 and "the prompt has more than cutoff_len 36 tokens" in str(account["dropped"])
