"""Images in requests: the prompt of training, and nothing that a stranger should not see."""

import base64
import os
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.config.load import load_infer
from luthier.data.media.kinds import media_kind
from luthier.serve import images
from luthier.serve.chat import prompt_of
from luthier.serve.errors import ApiError
from luthier.serve.fetching import NotFetched
from luthier.serve.images import ImageRules
from luthier.serve.loading import load_model
from luthier.serve.protocol import ChatMessage
from tests.media_models import draw, tiny_llava
from tests.serve.fakes import serving

PLACE = "messages[0].content[0]"
IMAGE = media_kind("image")
GREEDY = {"temperature": 0, "max_new_tokens": 6}


def address_of(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def asks(url: Any, text: str = "What is this?") -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]}
    ]


def refused(rules: ImageRules, url: str) -> str:
    with pytest.raises(ApiError) as caught:
        rules.item_of(url, IMAGE, PLACE)
    assert caught.value.param == PLACE
    return str(caught.value)


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("llava"))


def test_a_prompt_and_an_answer_are_those_of_the_terminal(llava, tmp_path):
    file = draw(tmp_path / "a.png", height=40, width=56)
    keys = {"model_name_or_path": str(llava), **GREEDY}
    chat = luthier.chat(keys)
    expected = chat.ask("What is this?", images=[str(file)])
    model, release = load_model(load_infer(keys), None, ImageRules(folder=tmp_path))
    for url in (address_of(file), "a.png", f"file://{file}"):
        ids = prompt_of(model, [ChatMessage.model_validate(asks(url)[0])], None, None)
        assert ids == chat._prompt_ids
        assert model.engine.generate(ids, model.settings).text == expected
    with serving(model) as (address, _):
        import openai

        client = openai.OpenAI(base_url=address + "/v1", api_key="x", max_retries=0)
        answer = client.chat.completions.create(model="any", messages=asks(address_of(file)), n=2)
        assert [choice.message.content for choice in answer.choices] == [expected, expected]
        assert answer.usage.prompt_tokens == len(chat._prompt_ids)
        begun = [*asks(address_of(file)), {"role": "assistant", "content": "A"}]
        more = client.chat.completions.create(model="any", messages=begun, extra_body={"continue_final_message": True})
        assert more.usage.prompt_tokens == len(chat._prompt_ids) + 1
        with pytest.raises(openai.BadRequestError, match=r"messages\[0\].content\[0\]: this image cannot be read"):
            client.chat.completions.create(model="any", messages=asks("data:image/png;base64,AAAA"))
    release()


def test_files_outside_the_folder_look_absent(tmp_path):
    inside, outside = tmp_path / "in", draw(tmp_path / "out.png")
    inside.mkdir()
    draw(tmp_path / "inner.png")  # a folder whose name begins alike is not the folder
    (inside / "link.png").symlink_to(outside)
    (tmp_path / "in2").mkdir()
    draw(tmp_path / "in2" / "a.png")
    rules = ImageRules(folder=inside)
    answers = {
        refused(rules, name)
        for name in ("absent.png", "../out.png", str(outside), "link.png", "../in2/a.png", f"file://{outside}", ".")
    }
    assert len(answers) == 1 and "no such image in the folder of the server (SAFE_MEDIA_PATH)" in answers.pop()
    (inside / "loop.png").symlink_to("loop.png")
    for name in ("a\0b.png", "file://\0", "a" * 300, "a/" * 3000, "loop.png"):  # no file can be there
        assert "no such image" in refused(rules, name)
    own = draw(inside / "own.png")
    assert rules.item_of("own.png", IMAGE, PLACE) == rules.item_of(str(own), IMAGE, PLACE) == str(own)
    assert "no such image" in refused(ImageRules(), str(own))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:image/png,abc", "not image data in base64: it does not begin with data:TYPE;base64,"),
        ("data:image/png;base64,@@@", "this is not image data in base64: "),
        ("data:image/png;base64,", "this image cannot be read"),
        ("data:text/html;base64,PGh0bWw+", "this image cannot be read"),
        ("data:image/png;base64," + "A" * 26_700_000, "more than 20,000,000 bytes"),
        ("https://example.org/a.png", "this server fetches no images -> send it as data:"),
    ],
)
def test_what_is_no_image_is_named(url, reason):
    assert reason in refused(ImageRules(), url)


def test_images_on_the_web_are_fetched_where_that_is_allowed(tmp_path):
    content = draw(tmp_path / "a.png").read_bytes()
    asked = []

    def fetch(url: str, most: int) -> bytes:
        asked.append((url, most))
        if "private" in url:
            raise NotFetched("private is not an internet address")
        return content

    rules = ImageRules(allows_urls=True, fetch=fetch)
    assert Path(rules.item_of("https://example.org/a.png", IMAGE, PLACE)).read_bytes() == content
    assert "cannot be fetched: private is not an internet address" in refused(rules, "http://private/a.png")
    assert asked[0] == ("https://example.org/a.png", images.MAX_IMAGE_BYTES)


def test_the_oldest_files_go(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    files = [draw(tmp_path / f"{number}.png", seed=number) for number in range(4)]
    monkeypatch.setattr(images, "MAX_KEPT_BYTES", sum(file.stat().st_size for file in files[1:]))
    kept = []
    for number, file in enumerate(files[:3]):
        kept.append(Path(ImageRules().item_of(address_of(file), IMAGE, PLACE)))
        os.utime(kept[-1], (number, number))
    assert all(path.exists() for path in kept)
    ImageRules().item_of(address_of(files[0]), IMAGE, PLACE)  # used again, so it is not the oldest any more
    ImageRules().item_of(address_of(files[3]), IMAGE, PLACE)
    assert [path.exists() for path in kept] == [True, False, True]
