"""The tokenizer is repaired and fitted to the chat format."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from luthier.core.errors import ModelError
from luthier.model.files.sources import ModelSource
from luthier.model.loading.load import load_model
from luthier.model.tokenizer import (
    fit_tokenizer,
    load_tokenizer,
    name_ends,
    read_new_special_tokens,
    stop_token_ids,
)
from tests.tiny import byte_tokenizer

MODEL_TYPES = ("llama", "qwen2", "mistral", "gemma", "gpt2", "gpt-sw3", "deepseek_v3", "own", None)
TOKENIZER_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizerFast", "Qwen2Tokenizer", None)


def test_a_tokenizer_pads_on_the_right(llama_folder):
    tokenizer = load_tokenizer(ModelSource(str(llama_folder)))
    assert tokenizer.padding_side == "right"
    assert tokenizer.encode("hi") == [71, 72]


def test_special_tokens_can_be_read_as_text(llama_folder):
    assert len(load_tokenizer(ModelSource(str(llama_folder))).encode("<s>")) == 1
    assert len(load_tokenizer(ModelSource(str(llama_folder)), split_special_tokens=True).encode("<s>")) == 3


def test_the_first_stop_word_becomes_the_end_token_and_the_others_special():
    fitted = fit_tokenizer(byte_tokenizer(), stop_words=["<|im_end|>", "<|im_start|>"], replace_eos=True)
    assert fitted.tokenizer.eos_token == "<|im_end|>"
    assert "<|im_start|>" in fitted.tokenizer.all_special_tokens
    assert fitted.stop_token_ids == (258, 257)
    assert fitted.added_tokens == ()
    assert any("'<|im_end|>'" in note for note in fitted.notes)


def test_stop_words_leave_the_end_token_without_replace_eos():
    fitted = fit_tokenizer(byte_tokenizer(), stop_words=["<|im_end|>"])
    assert fitted.tokenizer.eos_token == "</s>"
    assert fitted.stop_token_ids == (260, 258)


def test_a_missing_end_token_and_padding_token_are_given():
    fitted = fit_tokenizer(byte_tokenizer(eos_token=None, pad_token=None))
    assert fitted.tokenizer.eos_token == fitted.tokenizer.pad_token == "<|endoftext|>"
    assert len(fitted.notes) == 2
    kept = fit_tokenizer(byte_tokenizer(pad_token=None)).tokenizer
    assert kept.pad_token == kept.eos_token == "</s>"
    assert fit_tokenizer(byte_tokenizer()).notes == ()


def test_tokens_are_added_in_order_and_survive_saving(tmp_path):
    fitted = fit_tokenizer(byte_tokenizer(), add_tokens=["foo", "bar"], add_special_tokens=["<tool>"])
    assert fitted.added_tokens == ("foo", "bar", "<tool>")
    assert fitted.tokenizer.encode("foo<tool>bar") == [261, 263, 262]
    assert fitted.tokenizer.decode([261, 263], skip_special_tokens=True) == "foo"
    fitted.tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(ModelSource(str(tmp_path))).encode("foo<tool>bar") == [261, 263, 262]


def test_described_tokens_take_the_place_of_the_others(tmp_path):
    (tmp_path / "tokens.yaml").write_text("<think>: a thought begins\n<end>: it ends\n")
    described = read_new_special_tokens(tmp_path / "tokens.yaml")
    fitted = fit_tokenizer(byte_tokenizer(), add_special_tokens=["<x>"], new_special_tokens=described)
    assert fitted.added_tokens == ("<think>", "<end>")
    assert fitted.descriptions == described


@pytest.mark.parametrize(("content", "words"), [("- a", "must map"), ("a: [", "not valid YAML"), ("a: 1", "must map")])
def test_a_wrong_token_file_is_named(tmp_path, content, words):
    (tmp_path / "tokens.yaml").write_text(content)
    with pytest.raises(ModelError, match=words):
        read_new_special_tokens(tmp_path / "tokens.yaml")
    with pytest.raises(ModelError, match="there is no file"):
        read_new_special_tokens(tmp_path / "none.yaml")


def test_an_end_token_without_room_in_the_embedding_is_refused():
    with pytest.raises(ModelError, match="resize_vocab: true"):
        fit_tokenizer(byte_tokenizer(), stop_words=["<eot>"], replace_eos=True, vocab_size=261)
    roomy = fit_tokenizer(byte_tokenizer(), stop_words=["<eot>"], replace_eos=True, vocab_size=320)
    assert roomy.added_tokens == ("<eot>",)
    assert roomy.tokenizer.eos_token_id == 261


def test_a_stop_word_without_room_is_left_out_with_a_note():
    fitted = fit_tokenizer(byte_tokenizer(), stop_words=["<eot>", "<|im_end|>"], vocab_size=261)
    assert fitted.stop_token_ids == (260, 258)
    assert any("'<eot>'" in warning and "resize_vocab" in warning for warning in fitted.warnings)


def test_the_length_limit_is_raised():
    tokenizer = byte_tokenizer(model_max_length=16)
    assert fit_tokenizer(tokenizer, min_length_tokens=64).tokenizer.model_max_length == 64
    assert fit_tokenizer(tokenizer, min_length_tokens=32).tokenizer.model_max_length == 64


def test_stop_ids_are_each_named_once():
    assert stop_token_ids(byte_tokenizer(), ["</s>", "<|im_end|>", "no token"]) == (260, 258)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("named", TOKENIZER_CLASSES)
def test_the_class_is_what_transformers_chooses_by_the_whole_config(tmp_path, model_type, named):
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type} if model_type else {}))
    file = tmp_path / "tokenizer_config.json"
    keys = {key: value for key, value in json.loads(file.read_text()).items() if key != "tokenizer_class"}
    file.write_text(json.dumps(keys | ({"tokenizer_class": named} if named else {})))
    try:
        theirs = AutoTokenizer.from_pretrained(str(tmp_path), padding_side="right", split_special_tokens=False)
    except ValueError:
        with pytest.raises(ModelError):
            load_tokenizer(ModelSource(str(tmp_path)))
        return
    ours = load_tokenizer(ModelSource(str(tmp_path)))
    assert type(ours) is type(theirs) and ours.init_kwargs == theirs.init_kwargs
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()


def test_a_length_limit_that_is_no_number_is_refused():
    with pytest.raises(ModelError, match="model_max_length: 'x': must be a number"):
        fit_tokenizer(byte_tokenizer(model_max_length="x"), min_length_tokens=64)


@pytest.mark.parametrize(
    ("own", "stop_ids", "expected"),
    [(260, (260,), 260), (260, (258,), [258, 260]), ([260, 258], (258, 260), [260, 258]), (None, (260,), [260])],
)
def test_ends_that_a_model_names_already_stay_as_they_are_written(llama_folder, own, stop_ids, expected):
    model = load_model(ModelSource(str(llama_folder)), dtype=torch.float32)
    model.generation_config.eos_token_id = own
    name_ends(model, stop_ids)
    assert model.generation_config.eos_token_id == expected
