"""The model that is measured answers as `luthier chat` does."""

from dataclasses import replace

import pytest

import luthier
from luthier.config.load import load_eval
from luthier.data.types import Message, ToolCall
from luthier.evals.model import Asked
from luthier.infer.decoding import UNFINISHED
from luthier.infer.lean_step import LeanStep
from luthier.infer.reading import AnswerFormat
from luthier.workflow.evaluate import load_eval_model
from luthier.workflow.text import load_text_side


def test_answers_are_those_of_the_chat(llama_folder):
    keys = {"model_name_or_path": str(llama_folder), "template": "chatml", "do_sample": False, "max_new_tokens": 5}
    run = load_eval({**keys, "task": "perplexity", "dataset": "d"})
    model = load_eval_model(run, load_text_side(run))
    asked = [Asked((Message("user", text),)) for text in ("Hi", "Who are you, and what for?")]
    chat = luthier.chat(keys)
    expected = []
    for text in ("Hi", "Who are you, and what for?"):
        chat.clear()
        expected.append(chat.ask(text))
    answers = [answer.rstrip(UNFINISHED) for answer in model.generate(asked)]  # a chat waits for whole characters
    assert answers == expected
    assert list(model.generate(asked, max_new_tokens=1)) != expected
    assert model.num_positions == 512


@pytest.mark.parametrize("fast_path", [True, False])
def test_fast_path_false_keeps_the_models_own_code(llama_folder, fast_path, monkeypatch):
    keys = {"model_name_or_path": str(llama_folder), "template": "chatml", "task": "perplexity", "dataset": "d"}
    run = load_eval({**keys, "fast_path": fast_path, "do_sample": False, "max_new_tokens": 5})
    model, steps, original = load_eval_model(run, load_text_side(run)), [], LeanStep.__call__
    monkeypatch.setattr(LeanStep, "__call__", lambda *args: steps.append(1) or original(*args))
    list(model.answers([[1, 2, 3]]))
    assert len(steps) == (4 if fast_path else 0), "the first of five tokens comes from reading the prompt"


@pytest.fixture
def model(llama_folder):
    keys = {"model_name_or_path": str(llama_folder), "template": "chatml", "task": "perplexity", "dataset": "d"}
    run = load_eval(keys)
    return load_eval_model(run, load_text_side(run))


ANSWER = '<think>\nHm.\n</think>\n\nYes.\n<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call><|im_end|>\n'


def test_thoughts_and_calls_between_special_tokens_are_told_apart(model):
    """The tags of some models are special tokens, which an answer is to be without."""
    tags = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    model.tokenizer.add_special_tokens({"additional_special_tokens": tags})
    model = replace(model, answer_format=AnswerFormat(("<think>\n", "\n</think>\n\n"), "qwen"))
    ids = model.tokenizer.encode(ANSWER)
    read = model.read(model.reference(ids), [], with_calls=True)
    assert (read.thought, read.words, read.calls) == ("Hm.", "Yes.", (ToolCall("look", {}),))
    plain = model.read(model.reference(ids), [], with_calls=False).words
    assert plain == 'Yes.\n\n{"name": "look", "arguments": {}}\n', "as it is without special tokens"


def test_a_reference_ends_where_an_answer_does(model):
    """Also where special tokens are shown: an answer does not have the one at which it stops."""
    model = replace(model, settings=replace(model.settings, skip_special_tokens=False))
    assert model.reference(model.tokenizer.encode("Yes.<|im_end|>\n")) == "Yes."
