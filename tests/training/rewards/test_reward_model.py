"""A reward model scores answers in batches, with the scores that each has alone."""

from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from luthier.data.collate import concatenate_rows
from luthier.model.attention import isolate_samples
from luthier.model.heads.score_head import position_scores
from luthier.training.parts import collator
from luthier.training.rewards import Answered
from luthier.training.rewards.reward_model import RewardModel
from tests.tiny import TINY_LLAMA

CLOSING = (9, 8)


def answered(prompt_ids, answer_ids, *, stopped):
    texts = {"prompt": "p", "answer": "a", "given": "", "text": "pa"}
    return Answered(prompt_ids=prompt_ids, answer_ids=answer_ids, stopped=stopped, **texts)


ANSWERS = [answered([1] * (n % 5 + 1), [n + 2] * (n * 3 % 7 + 1), stopped=n % 2 == 0) for n in range(11)]


@pytest.fixture(params=["concatenated", "padded"])
def judge(request):
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**{**TINY_LLAMA, "num_labels": 1, "pad_token_id": 0})).eval()
    if request.param == "concatenated":
        isolate_samples(model)
    return partial(
        RewardModel, "judge", model, CLOSING, collator(0, concatenate_rows if request.param == "concatenated" else None)
    )


def alone(model):
    found = []
    for one in ANSWERS:
        ids = [*one.prompt_ids, *one.answer_ids, *(CLOSING if one.stopped else ())]
        with torch.no_grad():
            found.append(float(position_scores(model, {"input_ids": torch.tensor([ids])})[-1]))
    return found


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_scores_in_the_order_of_the_answers_whatever_the_batch(judge, batch_size):
    reward = judge(batch_size)
    expected = alone(reward.model)
    assert max(expected) - min(expected) > 1e-2
    assert reward(ANSWERS) == pytest.approx(expected, abs=1e-5)


def test_a_pass_for_each_batch_and_not_for_each_answer(judge):
    reward, sizes = judge(4), []
    reward.model.register_forward_pre_hook(lambda module, args, given: sizes.append(1), with_kwargs=True)
    reward(ANSWERS)
    assert len(sizes) == 3


def test_less_at_once_when_memory_is_out(judge, said):
    reward = judge(8)
    expected, collate, sizes = reward(ANSWERS), reward.collate, []

    def limited(rows):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return collate(rows)

    short = RewardModel("judge", reward.model, CLOSING, limited, 8)
    assert short(ANSWERS) == pytest.approx(expected, abs=1e-5) and sizes[:3] == [8, 4, 2]
    sizes.clear()
    assert short(ANSWERS) == pytest.approx(expected, abs=1e-5) and max(sizes) == 2
    assert said == [
        f"warning: out of memory with {size} answers scored at once; from now on {half} at once, with equal results"
        for size, half in ((8, 4), (4, 2))
    ]
