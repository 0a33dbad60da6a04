"""An answer is the same alone and beside others that come and go."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.errors import InvalidInput
from luthier.infer.batching import RowBatch, can_batch, num_read_together
from luthier.infer.row import Row
from luthier.infer.types import Answer, Settings
from tests.tiny import TINY_LLAMA, byte_tokenizer

EOS, PAD = 260, 256
KINDS = ("llama", "mistral", "gemma3", "gpt2")


def tiny(kind):
    """A random model in evaluation mode; the windows are shorter than the prompts."""
    import transformers as t

    torch.manual_seed(0)
    sliding = {**TINY_LLAMA, "sliding_window": 16, "head_dim": 16}
    layers = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    ends = {"bos_token_id": 259, "eos_token_id": EOS}
    model = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**TINY_LLAMA)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**sliding)),
        "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**sliding | layers)),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=512, **ends)
        ),
    }[kind]()
    return model.eval()


@pytest.fixture(scope="module")
def models():
    return {kind: tiny(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


class Asked:
    """One prompt, and what arrived for it."""

    def __init__(self, ids, **keys):
        self.ids, self.settings, self.arrived = ids, Settings(**{"do_sample": False, "max_new_tokens": 12} | keys), []

    def row(self, tokenizer):
        return Row(
            self.ids,
            self.settings,
            num_new_tokens=self.settings.max_new_tokens,
            stop_ids=[EOS],
            tokenizer=tokenizer,
            deliver=self.arrived.append,
        )

    @property
    def answer(self):
        assert isinstance(self.arrived[-1], Answer), self.arrived[-1]
        return self.arrived[-1]

    @property
    def new_ids(self):
        return [token.id for token in self.answer.tokens]


def alone(model, tokenizer, asked):
    again = Asked(asked.ids)
    again.settings = asked.settings
    answer_all(model, tokenizer, [again])
    return again.new_ids


def answer_all(model, tokenizer, asked, max_rows=8, rng=None):
    """All of them in one batch; with `rng` they arrive at random times, alone or several at once."""
    batch, waiting = RowBatch(model, tokenizer, frozenset([EOS])), [one.row(tokenizer) for one in asked]
    while waiting or batch.rows:
        if rng is None or rng.random() < 0.5:
            fitting = waiting[: max_rows - len(batch.rows)][: 8 if rng is None else rng.randrange(1, 5)]
            count = num_read_together(fitting) if fitting else 0
            batch.add(waiting[:count])
            waiting = waiting[count:]
        batch.step()
    return batch


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_of_generate_alone(models, tokenizer, kind):
    model, rng = models[kind], random.Random(kind)
    asked = [
        Asked([rng.randrange(256) for _ in range(rng.randrange(1, 60))], max_new_tokens=rng.randrange(1, 40))
        for _ in range(20)
    ]
    assert can_batch(model)
    answer_all(model, tokenizer, asked, rng=rng)
    for one in asked:
        ids = torch.tensor([one.ids])
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=one.settings.max_new_tokens,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        assert one.new_ids == expected[0, len(one.ids) :].tolist()


def test_sampled_answers_with_a_seed_are_the_same_alone_and_together(models, tokenizer):
    rng = random.Random(0)
    asked = [
        Asked([rng.randrange(256) for _ in range(rng.randrange(1, 30))], do_sample=True, seed=n, **keys)
        for n, keys in enumerate(
            (
                {},
                {"top_k": 0, "top_p": 1.0},
                {"top_k": 5, "temperature": 2.0},
                {"top_p": 0.5, "top_k": 0},
                {"min_p": 0.3},
                {"repetition_penalty": 1.5},
                {"presence_penalty": 2.0, "frequency_penalty": 1.0},
                {"logit_bias": {65: 3.0, 66: -100.0}},
            )
        )
    ]
    answer_all(models["llama"], tokenizer, asked, rng=rng)
    assert [one.new_ids for one in asked] == [alone(models["llama"], tokenizer, one) for one in asked]
    assert len({tuple(one.new_ids) for one in asked}) == len(asked)


EVENT = st.one_of(
    st.tuples(st.just("join"), st.lists(st.integers(1, 20), min_size=1, max_size=3), st.integers(1, 8), st.booleans()),
    st.tuples(st.just("step")),
    st.tuples(st.just("cancel"), st.integers(0, 7)),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(EVENT, min_size=3, max_size=20), st.sampled_from(["llama", "mistral"]))
def test_whoever_joins_leaves_or_is_canceled_changes_no_other_answer(models, tokenizer, events, kind):
    model, rng = models[kind], random.Random(len(events))
    batch, asked, canceled = RowBatch(model, tokenizer, frozenset([EOS])), [], set()
    for event in events:
        if event[0] == "join":
            _, lengths, num_new_tokens, samples = event
            keys = {"max_new_tokens": num_new_tokens, "do_sample": samples}
            newcomers = [
                Asked([rng.randrange(256) for _ in range(length)], **keys, seed=seed)
                for seed, length in enumerate(lengths)
            ]
            newcomers.append(Asked(newcomers[0].ids, **keys, seed=8))
            asked += newcomers
            batch.add([one.row(tokenizer) for one in newcomers])
        elif event[0] == "step":
            batch.step()
        elif batch.rows:
            row = batch.rows[event[1] % len(batch.rows)]
            row.is_canceled = True
            canceled.add(tuple(row.prompt_ids))
    while batch.rows:
        batch.step()
    for one in asked:
        if tuple(one.ids) in canceled:
            continue
        assert one.new_ids == alone(model, tokenizer, one)


def test_nothing_is_delivered_to_a_canceled_row(models, tokenizer):
    batch, gone, stays = RowBatch(models["llama"], tokenizer, frozenset([EOS])), Asked([1, 2]), Asked([3])
    for one in (gone, stays):
        batch.add([one.row(tokenizer)])
    seen = len(gone.arrived)
    batch.rows[0].is_canceled = True
    batch.step()
    assert len(gone.arrived) == seen and len(batch.rows) == 1
    while batch.rows:
        batch.step()
    assert stays.new_ids == alone(models["llama"], tokenizer, stays)


def test_a_fault_in_one_row_ends_that_row_only(models, tokenizer):
    class Broken:
        def mask(self, scores):
            raise InvalidInput("no token can come next")

    batch, broken, fine = RowBatch(models["llama"], tokenizer, frozenset([EOS])), Asked([1, 2]), Asked([3, 4])
    for one in (broken, fine):
        batch.add([one.row(tokenizer)])
    batch.rows[0].chooser.matcher, batch.rows[0].chooser.takes_largest = Broken(), False
    while batch.rows:
        batch.step()
    assert isinstance(broken.arrived[-1], InvalidInput)
    assert fine.new_ids == alone(models["llama"], tokenizer, fine)


def test_settings_that_leave_no_token_end_that_row_only(models, tokenizer):
    """Two infinite logits have no softmax."""
    sampled = {"do_sample": True, "temperature": 1.0, "seed": 5}
    batch, fine = RowBatch(models["llama"], tokenizer, frozenset([EOS])), Asked([3, 4], **sampled)
    broken = Asked([1, 2], **sampled, logit_bias={7: float("inf"), 8: float("inf")})
    for one in (broken, fine):
        batch.add([one.row(tokenizer)])
    while batch.rows:
        batch.step()
    assert isinstance(broken.arrived[-1], InvalidInput)
    assert fine.new_ids == alone(models["llama"], tokenizer, fine)


@pytest.mark.parametrize("together", [False, True])
def test_a_prompt_that_cannot_be_read_fails_alone(models, tokenizer, together):
    batch, wrong, fine = RowBatch(models["llama"], tokenizer, frozenset([EOS])), Asked([100_000]), Asked([1])
    rows = [fine.row(tokenizer), wrong.row(tokenizer)]
    for some in [rows] if together else [[row] for row in rows]:
        batch.add(some)
    assert isinstance(wrong.arrived[-1], IndexError) and len(batch.rows) == 1
    while batch.rows:
        batch.step()
    assert fine.new_ids == alone(models["llama"], tokenizer, fine)


def test_equal_prompts_are_read_once(models, tokenizer, monkeypatch):
    model, widths = models["llama"], []
    monkeypatch.setattr(
        model, "forward", lambda **given: widths.append(given["input_ids"].shape) or type(model).forward(model, **given)
    )
    asked = [Asked([1, 2, 3], do_sample=True, seed=seed) for seed in range(3)]
    batch = RowBatch(model, tokenizer, frozenset([EOS]))
    batch.add([one.row(tokenizer) for one in asked])
    batch.step()
    assert widths == [(1, 3), (3, 1)]


@pytest.mark.parametrize(
    ("lengths", "count"),
    [([8], 1), ([8, 8, 9], 3), ([8, 30], 1), ([8, 8, 30, 30], 2), ([600, 600], 1), ([400, 400, 400], 2), ([2000], 1)],
)
def test_prompts_of_about_one_length_are_read_together(tokenizer, lengths, count):
    rows = [Asked([index, *[1] * (length - 1)]).row(tokenizer) for index, length in enumerate(lengths)]
    assert num_read_together(rows) == count


def test_a_prompt_with_log_probabilities_is_read_alone(tokenizer):
    plain, scored = Asked([1, 2]), Asked([1, 2], num_logprobs=0, prompt_logprobs=True)
    assert num_read_together([plain.row(tokenizer), scored.row(tokenizer)]) == 1
    assert num_read_together([scored.row(tokenizer), plain.row(tokenizer)]) == 1


def test_log_probabilities_are_those_of_the_raw_logits(models, tokenizer):
    model, one = (
        models["llama"],
        Asked([5, 6, 7], do_sample=True, temperature=3.0, seed=1, num_logprobs=3, prompt_logprobs=True),
    )
    answer_all(model, tokenizer, [one])
    whole = [*one.ids, *one.new_ids]
    with torch.no_grad():
        logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    tokens = (*one.answer.prompt_tokens, *one.answer.tokens)
    assert [token.id for token in tokens] == whole and tokens[0].logprob is None
    for place, token in enumerate(tokens[1:]):
        assert token.logprob == pytest.approx(float(logprobs[place, token.id]), abs=1e-5)
        assert [i for i, _ in token.top] == logprobs[place].topk(3).indices.tolist()


def test_a_prompt_can_be_scored_without_an_answer(models, tokenizer):
    one = Asked([5, 6, 7], max_new_tokens=0, num_logprobs=0, prompt_logprobs=True)
    answer_all(models["llama"], tokenizer, [one])
    assert len(one.answer.prompt_tokens) == 3 and one.answer.num_new_tokens == 0


def test_models_with_another_state_cannot_batch():
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=4)
    assert not can_batch(MambaForCausalLM(config))


@pytest.mark.parametrize("file", [{"min_p": 1.0}, {"epsilon_cutoff": 0.9}])
def test_what_generation_config_json_leaves_out_is_never_sampled(tokenizer, file):
    """With these settings of the model, only the most likely token is left."""
    model = tiny("llama")
    for name, value in file.items():
        setattr(model.generation_config, name, value)
    free = {"do_sample": True, "top_p": 1.0, "top_k": 0, "temperature": 3.0, "seed": 1}
    sampled, greedy, asked = Asked([1, 2, 3], **free), Asked([1, 2, 3]), Asked([1, 2, 3], min_p=0.0, **free)
    answer_all(model, tokenizer, [sampled, greedy, asked])
    assert sampled.new_ids == greedy.new_ids
    assert (asked.new_ids == greedy.new_ids) == ("epsilon_cutoff" in file)  # a value of the caller takes precedence
