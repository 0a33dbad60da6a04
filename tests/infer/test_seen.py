"""Conversations about images: the prompt is that of training and of the processor, the answer that of transformers."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import luthier
from luthier.config.load import load_train
from luthier.core.errors import InvalidInput
from luthier.core.kinds import STAGES
from luthier.data.prepare import prepare
from luthier.data.types import PLACE
from luthier.infer.seen import SeenPrompt
from luthier.model.compat.llama4_outputs import give_image_outputs
from luthier.workflow.text import load_text_side
from tests.matrix import representatives
from tests.media_models import draw, talk
from tests.tiny import byte_tokenizer, tiny_llama
from tests.torchvision_models import FAMILIES

GREEDY = {"temperature": 0, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = FAMILIES[family](tmp_path_factory.mktemp(family))
        return made[family]

    return of


@pytest.mark.parametrize("family", representatives(FAMILIES, "paddleocr_vl", "llava"))
def test_an_answer_about_images_is_that_of_transformers(folders, family, tmp_path):
    folder = folders(family)
    images = [draw(tmp_path / "a.png", height=56, width=84), draw(tmp_path / "b.png", height=30, width=30)]
    chat = luthier.chat({"model_name_or_path": str(folder), **GREEDY})
    found = chat.ask("what", images=[str(path) for path in images])
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        talk("what", "", images)[:1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert chat._prompt_ids == inputs["input_ids"][0].tolist()
    give_image_outputs(model)
    output = model.generate(**inputs.to(model.dtype), max_new_tokens=6, do_sample=False)
    expected = output[0, inputs["input_ids"].shape[1] :]
    assert found == processor.tokenizer.decode(expected, skip_special_tokens=True).rstrip("\ufffd")


@pytest.mark.parametrize("template", [None, "chatml"])
def test_the_prompt_of_a_later_question_is_that_of_training(folders, template, tmp_path):
    folder = folders("paddleocr_vl")
    images = [str(draw(tmp_path / f"{n}.png", height=28 * n, width=56)) for n in (1, 2)]
    chat = luthier.chat({"model_name_or_path": str(folder), "template": template, **GREEDY})
    asked = [chat.conversation.ask("first", images[:1])]
    chat.conversation.answered("red")
    asked.append(chat.conversation.ask("second", images[1:]))
    chat.conversation.answered("blue")
    row = chat.conversation.as_row()
    assert row["images"] == images and [one["content"] for one in row["messages"][::2]] == [
        "<image>first",
        "<image>second",
    ]
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    columns = {"messages": "messages", "images": "images"}
    info = {"rows": {"file_name": "rows.json", "formatting": "openai", "columns": columns}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    keys = {"model_name_or_path": str(folder), "dataset_dir": str(tmp_path), "dataset": "rows", "stage": "sft"}
    run = load_train({**keys, "template": template, "do_train": True, "output_dir": str(tmp_path / "out")})
    trained = prepare(run, STAGES.get("sft").rows, load_text_side(run).encoding).table[0]
    for prompt in asked:
        assert isinstance(prompt, SeenPrompt)
        assert trained["input_ids"][: len(prompt)] == prompt
        assert trained["blocks"][: len(prompt.blocks)] == list(prompt.blocks)
    assert trained["images"] == images


def test_images_are_shown_before_a_question_and_taken_back_with_it(folders, tmp_path):
    image = str(draw(tmp_path / "a.png"))
    chat = luthier.chat({"model_name_or_path": str(folders("idefics3")), **GREEDY}).conversation
    chat.show(image)
    first = chat.ask("what")
    assert first.items == (image,) and chat.shown == ()
    chat.answered("red")
    assert chat.take_back() == "what" and (chat.shown, chat.items) == ((image,), ())
    assert chat.ask("what") == first
    chat.unanswered()
    assert (chat.items, chat.history) == ((), ())
    assert not isinstance(chat.ask("no image"), SeenPrompt)


def test_what_is_no_image_is_refused_in_a_line(folders, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    chat = luthier.chat({"model_name_or_path": str(folders("llava")), **GREEDY})
    with pytest.raises(InvalidInput, match=r"^image: nowhere\.png: there is no such file$"):
        chat.ask("what", images=["nowhere.png"])
    with pytest.raises(InvalidInput, match="is not an image of a known kind"):
        chat.ask("what", images=[str(tmp_path / "text.png")])
    with pytest.raises(InvalidInput, match="Unicode keeps"):
        chat.ask(f"what {PLACE}")
    assert chat.conversation.history == () and isinstance(chat.ask("hi"), str)


def test_a_model_of_text_reads_no_images(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    chat = luthier.chat({"model_name_or_path": str(tiny_llama(tmp_path / "m", tokenizer=tokenizer)), **GREEDY})
    with pytest.raises(InvalidInput, match="does not read images"):
        chat.ask("what", images=[str(draw(tmp_path / "a.png"))])


def test_beams_keep_the_images_of_their_prompt(folders, tmp_path):
    folder = folders("paddleocr_vl")
    images = [draw(tmp_path / "a.png", height=56, width=84), draw(tmp_path / "b.png", height=30, width=30)]
    chat = luthier.chat({"model_name_or_path": str(folder), **GREEDY, "num_beams": 3})
    found = chat.ask("what", images=[str(path) for path in images])
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(talk("what", "", images)[:1], add_generation_prompt=True, **options)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=6, num_beams=3, do_sample=False)
    expected = output[0, inputs["input_ids"].shape[1] :]
    assert found == processor.tokenizer.decode(expected, skip_special_tokens=True).rstrip("\ufffd")
