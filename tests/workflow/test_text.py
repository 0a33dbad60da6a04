"""The text side of a run: how answers end, in training and in what is saved."""

import json
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.config.keys.model import ModelConfig
from luthier.config.load import load_train
from luthier.core.errors import ModelError
from luthier.model.files.sources import ModelSource
from luthier.workflow.text import load_text_side, tokenizer_source
from tests.tiny import byte_tokenizer, tiny_llama

EOS = byte_tokenizer().eos_token_id


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    """A run on a base model without chat template."""
    rows = [{"instruction": f"question {n}", "output": f"answer {n}"} for n in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    return {
        "model_name_or_path": str(tiny_llama(tmp_path / "base")),
        "dataset_dir": str(tmp_path),
        "dataset": "rows",
        "output_dir": str(tmp_path / "out"),
        "do_train": True,
        "max_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
    }


def ends(folder: Path) -> set[int]:
    """Of an answer, as transformers and servers read them."""
    named = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    return {named} if isinstance(named, int) else set(named)


@pytest.mark.parametrize("finetuning_type", ["full", "lora"])
def test_training_chat_and_export_agree_on_the_end_of_an_answer(keys, tmp_path, finetuning_type):
    """Of a model without chat template: what is saved has one, which writes the eos that training taught."""
    from transformers import AutoTokenizer

    luthier.train({**keys, "finetuning_type": finetuning_type})
    out = tmp_path / "out"
    adapter = {} if finetuning_type == "full" else {"adapter_name_or_path": str(out), "finetuning_type": "lora"}
    base = str(out) if finetuning_type == "full" else keys["model_name_or_path"]
    luthier.export({"model_name_or_path": base, **adapter, "export_dir": str(tmp_path / "merged")})
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for folder in (out, tmp_path / "merged"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.apply_chat_template(talk, tokenize=False) == "ab</s>"
        assert tokenizer.eos_token_id == EOS
    for folder in ([out] if finetuning_type == "full" else []) + [tmp_path / "merged"]:
        assert EOS in ends(folder)
    again = load_text_side(load_train({**keys, "model_name_or_path": str(tmp_path / "merged")}))
    assert EOS in again.fitted.stop_token_ids


def test_the_stop_word_of_a_format_is_saved_with_the_model(keys, tmp_path):
    luthier.train({**keys, "finetuning_type": "full", "template": "chatml"})
    assert ends(tmp_path / "out") >= {EOS, 258}


def test_no_marks_are_a_warning(keys, said):
    load_text_side(load_train(keys))
    (line,) = [line for line in said if "no chat template" in line]
    assert "'</s>'" in line and "name a template" in line


def test_an_end_that_is_no_token_of_the_model_is_a_warning(keys, said):
    """Answers of deepseekcoder end in `<|EOT|>`, which is many tokens for this model."""
    text = load_text_side(load_train({**keys, "template": "deepseekcoder"}))
    assert text.encoding.closing_eos == EOS
    assert [line for line in said if "'</s>' is learned after it" in line]


def without_eos(folder: Path, **model: Any) -> str:
    return str(tiny_llama(folder, tokenizer=byte_tokenizer(eos_token=None, pad_token=None), **model))


def test_a_tokenizer_without_eos_takes_a_token_that_the_model_knows(keys, tmp_path, said):
    text = load_text_side(load_train({**keys, "model_name_or_path": without_eos(tmp_path / "other")}))
    assert text.tokenizer.eos_token == "<|endoftext|>"
    assert [line for line in said if "no end token (eos)" in line]


def bare(**roles: Any) -> Any:
    """A tokenizer without any special token but `<|im_end|>`."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] == "<|im_end|>"]
    content["added_tokens"][0]["id"] = 256
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **roles)


def test_a_tokenizer_without_eos_takes_the_stop_word_of_the_format(keys, tmp_path):
    base = tiny_llama(tmp_path / "other", tokenizer=bare(), vocab_size=257)
    text = load_text_side(load_train({**keys, "model_name_or_path": str(base), "template": "chatml"}))
    assert text.tokenizer.eos_token == "<|im_end|>" and text.fitted.stop_token_ids == (256,)
    assert text.fitted.added_tokens == ()


def test_a_tokenizer_without_any_end_is_refused_with_the_remedy(keys, tmp_path):
    base = str(tiny_llama(tmp_path / "other", tokenizer=bare(), vocab_size=257))
    with pytest.raises(ModelError, match=r"no end token .*-> .*eos_token.*template.*resize_vocab: true"):
        load_text_side(load_train({**keys, "model_name_or_path": base}))
    grown = load_text_side(load_train({**keys, "model_name_or_path": base, "resize_vocab": True}))
    assert grown.fitted.added_tokens == ("<|endoftext|>",) and grown.tokenizer.eos_token == "<|endoftext|>"


def test_an_end_token_that_the_model_has_never_seen_is_a_warning(keys, tmp_path, said):
    base = str(tiny_llama(tmp_path / "other", tokenizer=bare(), vocab_size=320))
    text = load_text_side(load_train({**keys, "model_name_or_path": base}))
    assert text.fitted.warnings and text.tokenizer.eos_token_id == 257


@pytest.mark.parametrize(
    ("files", "is_own"),
    [
        (("tokenizer_config.json", "tokenizer.json"), True),
        (("tokenizer_config.json", "tokenizer.model", "added_tokens.json"), True),
        (("tokenizer_config.json", "vocab.json", "merges.txt"), True),
        (("tokenizer_config.json",), False),
        (("tokenizer.json",), False),
        ((), False),
    ],
)
def test_the_tokenizer_beside_the_last_adapter_is_taken_if_it_is_whole(tmp_path, files, is_own):
    folder = tmp_path / "lora" / "inner"
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).touch()
    keys = ModelConfig(
        model_name_or_path="model", adapter_name_or_path=("first", str(tmp_path / "lora")), adapter_folder="inner"
    )
    expected = str(folder) if is_own else "model"
    assert tokenizer_source(keys, ModelSource("model")).name == expected
