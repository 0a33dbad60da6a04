"""The model of a run file, ready to be served."""

import pytest
import torch

from luthier.config.load import load_infer
from luthier.data.chat.encoder import Encoder
from luthier.serve.loading import default_name, load_model
from luthier.serve.model import ChatModel, RewardModel
from luthier.serve.protocol import ScoreRequest
from luthier.serve.scoring import scored
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
