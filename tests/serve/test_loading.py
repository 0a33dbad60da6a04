"""The model of a run file, ready to be served."""

import pytest
import torch

import luthier
from luthier.config.load import load_infer
from luthier.data.chat.encoder import Encoder
from luthier.serve.loading import default_name, load_model
from luthier.serve.model import ChatModel, RewardModel
from luthier.serve.protocol import ScoreRequest
from luthier.serve.scoring import scored
from tests.small_world import PAIRS, small_world
from tests.tiny import byte_tokenizer


@pytest.mark.parametrize(
    ("path", "name"), [("models/mine", "mine"), ("models/mine/", "mine"), ("org/name", "name"), ("a/b.gguf", "b.gguf")]
)
def test_the_name_is_that_of_the_folder(path, name):
    assert default_name(path) == name


def test_a_chat_model(llama_folder):
    run = load_infer({"model_name_or_path": str(llama_folder), "template": "qwen3", "max_new_tokens": 5})
    model, release = load_model(run, None)
    assert isinstance(model, ChatModel)
    assert (model.name, model.num_positions, model.vocab_size) == (llama_folder.name, 512, 320)
    assert model.settings.max_new_tokens == 5 and model.thinking_tags == ("<think>\n", "\n</think>\n\n")
    assert model.engine.generate([1, 2], model.settings).num_new_tokens <= 5
    release()


def test_a_format_without_thoughts(llama_folder):
    run = load_infer({"model_name_or_path": str(llama_folder), "template": "qwen"})
    model, release = load_model(run, "mine")
    assert (model.name, model.thinking_tags) == ("mine", None)
    release()


def test_a_reward_model_scores_the_last_token(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from tests.tiny import TINY_LLAMA

    torch.manual_seed(0)
    plain = LlamaForSequenceClassification(LlamaConfig(**TINY_LLAMA, num_labels=1)).eval()
    plain.save_pretrained(tmp_path / "judge")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "judge")
    run = load_infer({"model_name_or_path": str(tmp_path / "judge"), "stage": "rm", "template": "qwen"})
    model, _ = load_model(run, None)
    assert isinstance(model, RewardModel)
    texts = ["a good answer", "bad", "the longest of these texts"]
    found = scored(ScoreRequest(messages=texts), model)["scores"]
    for text, score in zip(texts, found, strict=True):
        ids = torch.tensor([Encoder(tokenizer).text(text)])
        with torch.no_grad():
            assert score == pytest.approx(plain(ids).logits.item(), abs=1e-6)


def test_scores_are_those_of_the_evaluation_in_training(tmp_path):
    pairs = {"dataset": "pairs", "eval_dataset": "pairs", "do_eval": True}
    keys = {**small_world(tmp_path), **pairs, "stage": "rm", "finetuning_type": "lora"}
    result = luthier.train({**keys, "output_dir": str(tmp_path / "out"), "max_steps": 2, "learning_rate": 1e-2})
    evaluation = result.metrics["eval"]
    run = load_infer(
        {
            "model_name_or_path": keys["model_name_or_path"],
            "adapter_name_or_path": str(tmp_path / "out"),
            "stage": "rm",
            "template": keys["template"],
        }
    )
    model, _ = load_model(run, None)
    for side in ("chosen", "rejected"):
        texts = [
            f"<|im_start|>user\n{row['instruction']}<|im_end|>\n<|im_start|>assistant\n{row[side]}<|im_end|>\n"
            for row in PAIRS
        ]
        scores = scored(ScoreRequest(messages=texts), model)["scores"]
        assert sum(scores) / len(scores) == pytest.approx(evaluation[f"eval_rewards/{side}"], abs=1e-6)
