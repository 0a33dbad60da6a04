"""Log-probabilities against lm-evaluation-harness's own model of transformers, and against themselves.

Sharing what texts have in common and padding change nothing but the last digits: 1e-6 one context at a time, 1e-5 with
padding.
"""

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig

from luthier.evals.scorer import MIN_BEGINNING, Pair, Scorer, encode_pair, rolling_pairs
from tests.tiny import TINY_LLAMA, byte_tokenizer

SIZES = {name: TINY_LLAMA[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 160}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, **HEADS),
    "window": lambda: MistralConfig(**SIZES, **HEADS, sliding_window=48),
    "learned positions": lambda: GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=160),
}
INTRO = "These are questions about numbers, each with one right answer.\n"
TEXTS = [
    *((f"{INTRO}What is {n} and {n}? Say it: ", choice) for n in (1, 20, 3000) for choice in ("two", "4", "six eggs")),
    ("One more", " thing"),
    ("Spaces at the end   ", "x"),
    ("", "no context"),
    ("long " * 60, "end"),
]


def tiny_model(name: str = "llama"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    with torch.no_grad():  # sharper than random weights are, so that a token at the wrong place is noticed
        model.get_output_embeddings().weight.mul_(8)
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def pairs(tokenizer):
    return [encode_pair(tokenizer, *texts) for texts in TEXTS]


def in_full(model, pair: Pair) -> float:
    """sum_t log softmax(logits)_t of the whole text in one pass."""
    limit = model.config.max_position_embeddings
    ids = torch.tensor([(*pair.context, *pair.continuation)[-(limit + 1) :]])
    with torch.inference_mode():
        logps = model(ids[:, :-1]).logits.float().log_softmax(-1)
    return logps[0].gather(-1, ids[0, 1:, None])[-len(pair.continuation) :].sum().item()


@pytest.mark.parametrize(("batch_size", "tolerance"), [(1, 1e-6), (3, 1e-5), (16, 1e-5)])
def test_the_numbers_are_those_of_whole_texts(model, pairs, batch_size, tolerance):
    expected = [in_full(model, pair) for pair in pairs]
    found = [score.logprob for score in Scorer(model, batch_size).scores(pairs)]
    assert found == pytest.approx(expected, abs=tolerance, rel=tolerance)


@pytest.mark.parametrize(("batch_size", "tolerance"), [(1, 1e-6), (8, 1e-5)])
def test_the_numbers_are_those_of_the_harness(tokenizer, batch_size, tolerance):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    model = tiny_model()
    theirs = huggingface.HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=batch_size)
    requests = [SimpleNamespace(args=texts) for texts in TEXTS]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = Scorer(model, batch_size).scores([encode_pair(tokenizer, *texts) for texts in TEXTS])
    assert [s.logprob for s in found] == pytest.approx([logp for logp, _ in expected], abs=tolerance, rel=tolerance)
    assert [score.is_greedy for score in found] == [greedy for _, greedy in expected]


def test_whole_texts_are_those_of_the_harness(tokenizer):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    model = tiny_model()
    theirs = huggingface.HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=1)
    for text in ("short", "x" * 160, "a longer text, " * 30):
        (expected,) = theirs.loglikelihood_rolling([SimpleNamespace(args=(text,))], disable_tqdm=True)
        ids = tokenizer.encode(text)
        found = sum(s.logprob for s in Scorer(model, 4).scores(rolling_pairs(ids, tokenizer.bos_token_id, 160)))
        assert found == pytest.approx(expected, rel=1e-6)


def test_the_order_changes_nothing(model, pairs):
    order = list(range(len(pairs)))
    random.Random(0).shuffle(order)
    straight = Scorer(model, 4).scores(pairs)
    shuffled = Scorer(model, 4).scores([pairs[number] for number in order])
    for place, number in enumerate(order):
        assert shuffled[place].logprob == pytest.approx(straight[number].logprob, abs=1e-5)


def counted(model):
    """[tokens that the model has read so far], padding included."""
    read = []
    model.register_forward_pre_hook(lambda _, args, given: read.append(given["input_ids"].numel()), with_kwargs=True)
    return read


def test_what_is_shared_is_read_once():
    model = tiny_model()
    scorer = Scorer(model, 2)
    read = counted(model)
    beginning = tuple(range(100, 100 + MIN_BEGINNING))
    contexts = [(*beginning, 1, 2), (*beginning, 3, 4)]
    pairs = [Pair(context, (5, 6, choice)) for context in contexts for choice in range(4)]
    first = scorer.scores(pairs, beginning)
    assert read == [MIN_BEGINNING, 2 * 2, 8 * 2]
    assert scorer.scores(pairs, beginning) == first and read[3:] == [2 * 2, 8 * 2]
    scorer.letter_logprobs(contexts, [(7, 8, 9)] * 2, beginning)
    assert read[5:] == [2 * 2]


def test_a_greedy_continuation_is_what_the_model_writes():
    model = tiny_model()
    context = torch.tensor([[10, 11, 12]])
    written = model.generate(context, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)[
        0, 3:
    ].tolist()
    wrong = [*written[:3], (written[3] + 1) % 320]
    found = Scorer(model, 2).scores([Pair((10, 11, 12), tuple(ids)) for ids in (written, wrong)])
    assert [score.is_greedy for score in found] == [True, False]


def test_letters_are_scored_over_the_whole_vocabulary():
    model = tiny_model()
    (found,) = Scorer(model, 1).letter_logprobs([(1, 2, 3)], [tuple(range(320))])
    assert torch.tensor(found).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_models_whose_rows_cannot_share_are_scored_in_full(pairs):
    model = tiny_model()
    scorer = Scorer(model, 4)
    shared = scorer.scores(pairs)
    scorer._shares = False
    assert [s.logprob for s in scorer.scores(pairs)] == pytest.approx([s.logprob for s in shared], abs=1e-5)


def test_where_a_text_is_cut(tokenizer):
    a, b, c, space = tokenizer.encode("abc ")
    assert encode_pair(tokenizer, "ab  ", "c") == Pair((a, b), (space, space, c))
    assert encode_pair(tokenizer, "", "ab") == Pair((tokenizer.bos_token_id,), (a, b))


def test_windows_predict_each_token_once():
    ids = list(range(10, 33))
    pairs = rolling_pairs(ids, 1, 8)
    assert [token for pair in pairs for token in pair.continuation] == ids
    assert all(len(pair.context) + len(pair.continuation) <= 9 for pair in pairs)
    assert pairs[0].context == (1,) and len(pairs[-1].context) == 2
    assert rolling_pairs([], 1, 8) == []
