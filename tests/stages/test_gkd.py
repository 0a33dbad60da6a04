"""Distillation and the KL penalty of ASFT: divergences by hand, autograd gradients, a student near its teacher."""

import json

import pytest
import torch

import luthier
from luthier.config.load import load_train
from luthier.core.errors import ConfigError, ModelError, RowError
from luthier.data.chat.encoder import Encoder
from luthier.data.collate import concatenate_rows
from luthier.data.rows.encoding import Encoding
from luthier.data.rows.tokenize import turn_ids
from luthier.data.templates import get_template
from luthier.data.types import Dialogue, Message
from luthier.model.frozen_models import InitialPolicy, SeparateModel
from luthier.model.heads.objective import predictions_at
from luthier.model.heads.output_head import OutputHead, inspect_head
from luthier.model.kernels import chunked_head
from luthier.model.types import Models
from luthier.stages._divergence import forward_kl, generalized_jsd
from luthier.stages.gkd import STAGE, GkdConfig
from luthier.stages.sft import STAGE as SFT
from luthier.stages.sft import SftConfig
from tests import tiny
from tests.small_world import small_world

RUN = {"model_name_or_path": "x/y", "dataset": "d", "output_dir": "o"}
OWN = {"stage": "gkd", "teacher_model": "t/t", "gkd_lambda": 0.5}
ROWS = [
    {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4]},
    {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]},
]


def model_of(seed: int, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**tiny.TINY_LLAMA, **changes})).double().eval()


def isolated(model):
    from luthier.model.attention import isolate_samples

    isolate_samples(model)
    return model


def test_each_target_counts_with_its_weight():
    """The loss is linear in the weights, so it is that of each target alone times its weight."""
    student, teacher = isolated(model_of(1)), isolated(model_of(2))
    models = Models(student, inspect_head(student), {"teacher": SeparateModel(teacher, inspect_head(teacher))})

    def total(weights):
        batch = {**concatenate_rows(ROWS), "weights": torch.tensor(weights)}
        return STAGE.loss(models, batch, GkdConfig(), state={}, training=True).total.item()

    each = [total([float(place == number) for place in range(4)]) for number in range(4)]
    weights = [1.0, 0.5, 0.25, 2.0]
    assert min(each) > 0
    assert total(weights) == pytest.approx(sum(w * one for w, one in zip(weights, each, strict=True)))


@pytest.mark.parametrize("sizes", [(320, 320), (320, 328), (328, 320)], ids=["alike", "teacher", "student"])
@pytest.mark.parametrize("at_once", [1, 2**26])
def test_the_loss_of_a_batch_is_the_divergence_at_its_targets(monkeypatch, sizes, at_once):
    """Row by row with the models' own logits; one whose embedding is padded further gives the same words."""
    for limit in ("OBJECTIVE_ELEMENTS", "SMALL_OBJECTIVE_ELEMENTS"):
        monkeypatch.setattr(chunked_head, limit, at_once)
    student, teacher = (model_of(seed, vocab_size=size) for seed, size in enumerate(sizes, 1))
    expected = kl = 0.0
    for row in ROWS:
        ids = torch.tensor([row["input_ids"]])
        own, given = (model(input_ids=ids).logits[0, :-1, :320] for model in (student, teacher))
        learned = torch.tensor(row["labels"][1:]) != -100
        expected += generalized_jsd(own / 2, given / 2, beta=0.5)[learned].sum().item()
        kl += forward_kl(own, given)[learned].sum().item()
    isolated(student), isolated(teacher)
    models = Models(student, inspect_head(student), {"teacher": SeparateModel(teacher, inspect_head(teacher))})
    batch = concatenate_rows(ROWS)
    for head in (models.head, OutputHead(None, True)):
        one = Models(student, head, models.frozen)
        output = STAGE.loss(one, batch, GkdConfig(gkd_temperature=2.0), state={}, training=True)
        assert output.total.item() == pytest.approx(expected, rel=1e-9)
        assert output.metrics["teacher_kl"] == (pytest.approx(kl, rel=1e-5), 4) and STAGE.units(batch) == 4


def test_the_balance_loss_of_experts_is_added_for_each_target():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    student, teacher = Qwen3MoeForCausalLM(Qwen3MoeConfig(**tiny.TINY_LLAMA, **experts)).train(), model_of(2).float()
    frozen = {"teacher": SeparateModel(isolated(teacher), inspect_head(teacher))}
    isolated(student)
    plain, balanced = (
        STAGE.loss(Models(student, inspect_head(student, coefficient), frozen), concatenate_rows(ROWS), GkdConfig(),
                   state={}, training=True)
        for coefficient in (None, 0.5)
    )  # fmt: skip
    total, count = balanced.metrics["router_loss"]
    assert count == 4 and total.item() > 0
    assert (balanced.total - plain.total).item() == pytest.approx(0.5 * total.item(), rel=1e-4)


def test_the_initial_policy_does_not_change():
    """Also its output head, which is asked after the weights have gone back to their place."""
    policy = isolated(model_of(3))
    start = InitialPolicy.of(policy, inspect_head(policy))
    batch = concatenate_rows(ROWS)
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    inputs |= {"cu_seq_lens_q": batch["cu_seq_lens_q"]}
    before = policy(**inputs, use_cache=False).logits.detach().clone()
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1.5)
    after = policy(**inputs, use_cache=False).logits.detach().clone()
    policy.train()
    with start.running() as network:
        assert not network.training
        torch.testing.assert_close(network(**inputs, use_cache=False).logits, before)
        found = predictions_at(network, start.head, inputs, batch["positions"])
    assert policy.training
    torch.testing.assert_close(found.logits(slice(None)), before[0, batch["positions"]])
    torch.testing.assert_close(policy.eval()(**inputs, use_cache=False).logits, after)


def test_asft_is_dft_plus_a_kl_penalty():
    """sum_t [- sg(p_t) log p_t + alpha KL(R_t || P_t)], by autograd on plain logits; without the penalty it is DFT."""
    policy, reference = isolated(model_of(4)), isolated(model_of(5))
    batch = concatenate_rows(ROWS)
    positions, targets = batch["positions"], batch["targets"]
    inputs = {
        key: value for key, value in batch.items() if key in ("input_ids", "position_ids") or "_q" in key or "_k" in key
    }
    logps = policy(**inputs, use_cache=False).logits[0, positions].log_softmax(-1)
    own = logps.gather(-1, targets[:, None]).squeeze(-1)
    given = reference(**inputs, use_cache=False).logits[0, positions].detach().log_softmax(-1)
    expected = (-(own.detach().exp() * own) + 0.3 * (given.exp() * (given - logps)).sum(-1)).sum()
    wanted = torch.autograd.grad(expected, list(policy.parameters()))
    models = Models(policy, inspect_head(policy), {"reference": SeparateModel(reference, inspect_head(reference))})
    output = SFT.loss(models, batch, SftConfig(use_asft_loss=True, asft_alpha=0.3), state={}, training=True)
    torch.testing.assert_close(output.total, expected)
    for mine, theirs in zip(torch.autograd.grad(output.total, list(policy.parameters())), wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    alone = SFT.loss(models, batch, SftConfig(use_asft_loss=True, asft_alpha=0.0), state={}, training=True)
    dft = SFT.loss(models, batch, SftConfig(use_dft_loss=True), state={}, training=True)
    torch.testing.assert_close(alone.total, dft.total)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"stage": "gkd"}, "teacher_model: is missing, and this stage needs a teacher"),
        ({"stage": "gkd", "teacher_model": "t/t", "gkd_beta": 1.5}, "gkd_beta: 1.5: must be from 0 to 1"),
        ({"stage": "gkd", "teacher_model": "t/t", "gkd_temperature": 0}, "gkd_temperature: 0: must be above 0"),
        ({**OWN, "gkd_lambda": 1.5}, "gkd_lambda: 1.5: must be from 0 to 1"),
        ({**OWN, "packing": True}, "packing: true: joins rows, and with gkd_lambda above 0 each row is a prompt"),
        ({**OWN, "neat_packing": True}, "neat_packing: true: joins rows"),
        ({**OWN, "streaming": True, "max_steps": 1}, "streaming: true: with gkd_lambda above 0 prompts are sampled"),
        ({**OWN, "train_on_prompt": True}, "train_on_prompt: true: with gkd_lambda above 0 only the last answers"),
        ({**OWN, "on_overlong": "split"}, "on_overlong: 'split': cuts a row into several"),
        ({**OWN, "shift_attn": True}, "shift_attn: true: with gkd_lambda above 0 answers are generated"),
        ({"use_asft_loss": True, "use_dft_loss": True}, "use_dft_loss: true: is one loss, and use_asft_loss another"),
        (
            {"use_asft_loss": True, "label_smoothing_factor": 0.1},
            "label_smoothing_factor: 0.1: spreads the target",
        ),
    ],
)
def test_rules(keys, message):
    with pytest.raises(ConfigError, match=message):
        load_train({**RUN, **keys})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distil")
    keys = small_world(folder)
    teacher = tiny.tiny_llama(folder / "teacher", seed=7, max_position_embeddings=1024, hidden_size=32)
    return {**keys, "teacher_model": str(teacher)}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_student_approaches_its_teacher(world, tmp_path, method):
    run = {**world, "stage": "gkd", "finetuning_type": method, "output_dir": str(tmp_path), "max_steps": 12}
    run |= {"learning_rate": 1e-2, "logging_steps": 1, "gkd_beta": 0.0, "lr_scheduler_type": "constant"}
    luthier.train(run)
    log = [json.loads(line) for line in (tmp_path / "trainer_log.jsonl").read_text().splitlines()]
    distances = [entry["teacher_kl"] for entry in log if "teacher_kl" in entry]
    assert distances[-1] < 0.8 * distances[0]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses == pytest.approx(distances, rel=1e-3), "at beta 0 and temperature 1 the loss is the forward KL"


def log_of(folder):
    log = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return [entry for entry in log if "loss" in entry]


def test_the_student_is_trained_on_sampled_answers_and_evaluated_on_those_of_the_dataset(world, tmp_path):
    run = {**world, "stage": "gkd", "finetuning_type": "full", "output_dir": str(tmp_path), "max_steps": 12}
    run |= {"learning_rate": 1e-2, "logging_steps": 1, "gkd_lambda": 1.0, "lr_scheduler_type": "constant"}
    run |= {"max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "gkd_beta": 0.0}
    result = luthier.train({**run, "val_size": 4, "do_eval": True})
    log = log_of(tmp_path)
    assert log[-1]["teacher_kl"] < 0.8 * log[0]["teacher_kl"]
    assert all(1 <= entry["answer_tokens"] <= 8 and 0 <= entry["finished_answers"] <= 1 for entry in log)
    evaluation = result.metrics["eval"]
    assert evaluation["eval_loss"] == pytest.approx(evaluation["eval_teacher_kl"], rel=1e-3)
    alone = luthier.train({**run, "val_size": 4, "do_eval": True, "do_train": False, "output_dir": str(tmp_path / "e")})
    assert evaluation["eval_teacher_kl"] < alone.metrics["eval"]["eval_teacher_kl"]


def test_the_share_of_sampled_answers_is_gkd_lambda(world, tmp_path):
    """At a share near 0 the steps are those of given answers, here one answer to each prompt; at a half, half are."""
    run = {**world, "stage": "gkd", "dataset": "numbers", "max_new_tokens": 6, "logging_steps": 1, "max_steps": 8}
    found = {}
    for share in (0.0, 1e-9, 0.5):
        luthier.train({**run, "gkd_lambda": share, "output_dir": str(tmp_path / str(share))})
        found[share] = log_of(tmp_path / str(share))
    assert [entry["loss"] for entry in found[1e-9]] == pytest.approx([entry["loss"] for entry in found[0.0]], rel=1e-5)
    assert not any(key in entry for entry in found[0.0] for key in ("own_answers", "answer_tokens"))
    draws = [entry["own_answers"] for entry in found[0.5]]
    assert set(draws) == {0.0, 1.0}
    assert [bool(draw) for draw in draws] == ["answer_tokens" in entry for entry in found[0.5]]


def test_the_choice_depends_only_on_the_seed_and_the_number():
    from tests.training.test_rollouts import rollouts_of

    def draws(seed, share):
        rollouts = rollouts_of(STAGE.rollout(GkdConfig(gkd_lambda=share)), seed)
        return [rollouts.is_sampled(number) for number in range(1000)]

    assert draws(42, 0.3) == draws(42, 0.3) != draws(43, 0.3)
    assert sum(draws(42, 0.3)) == pytest.approx(300, abs=60)
    assert all(draws(42, 1.0)) and STAGE.rollout(GkdConfig()) is None


def test_rows_that_the_student_answers(tokenizer):
    """The prompt as a server sends it and the last answer, which is cut before the prompt is."""
    talk = Dialogue((Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "dd")))
    config = GkdConfig(gkd_lambda=0.5)

    def row(cutoff_len):
        encoding = Encoding(Encoder(tokenizer), get_template("chatml"), cutoff_len=cutoff_len)
        ((written,),) = STAGE.rows.write(talk, encoding, STAGE.rows.settings(config))
        (encoded,) = STAGE.rows.label(turn_ids(encoding.encoder, [written]), encoding, STAGE.rows.settings(config))
        return encoded

    whole = row(None)
    num_learned = whole.num_labels
    assert tokenizer.decode(whole.input_ids[:-num_learned]).endswith("c<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(whole.labels[-num_learned:]) == "dd<|im_end|>\n"
    cut = row(len(whole.input_ids) - 1)
    assert cut.input_ids == whole.input_ids[:-1] and cut.lost_terminator and cut.lost_labels == 1
    with pytest.raises(RowError, match="the prompt alone fills cutoff_len"):
        row(len(whole.input_ids) - num_learned)


def test_rows_with_weights_of_their_own_are_dropped(world, tmp_path):
    run = {**world, "stage": "gkd", "dataset": "weighted", "gkd_lambda": 1.0, "max_new_tokens": 4, "max_steps": 1}
    luthier.train({**run, "output_dir": str(tmp_path)})
    account = json.loads((tmp_path / "data_report.json").read_text())["datasets"]["weighted"]
    assert account["kept"] == 2 and 'a message carries "loss"' in str(account["dropped"])


def test_asft_keeps_the_model_near_its_start(world, tmp_path):
    """At the first step the reference is the model itself; after some steps a strong penalty has kept it nearer."""
    keys = {key: value for key, value in world.items() if key != "teacher_model"}
    apart = {}
    for alpha in (0.0, 5.0):
        run = {**keys, "finetuning_type": "full", "use_asft_loss": True, "asft_alpha": alpha, "max_steps": 8}
        run |= {"output_dir": str(tmp_path / str(alpha)), "learning_rate": 3e-3, "logging_steps": 1}
        luthier.train(run)
        log = [json.loads(line) for line in (tmp_path / str(alpha) / "trainer_log.jsonl").read_text().splitlines()]
        apart[alpha] = [entry["reference_kl"] for entry in log if "reference_kl" in entry]
    assert apart[0.0][0] == apart[5.0][0] == pytest.approx(0.0, abs=1e-6)
    assert apart[5.0][-1] < 0.5 * apart[0.0][-1]


def test_a_teacher_with_another_tokenizer_is_refused(world, tmp_path):
    other = tiny.tiny_llama(tmp_path / "other", seed=7, max_position_embeddings=1024)
    keys = {**world, "stage": "gkd", "output_dir": str(tmp_path / "out"), "teacher_model": str(other)}
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace("<|im_start|>", "<|begin|>"))
    with pytest.raises(
        ModelError, match=r"teacher_model: .*its tokenizer is another one \('<\|im_start\|>' is token 257"
    ):
        luthier.train(keys)
