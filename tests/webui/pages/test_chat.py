"""The page Chat in a real browser, with a real model whose answers are known (`talker`)."""

import pytest

from tests.webui.browser import Browser, board, browser, needs_browser
from tests.webui.talker import ANSWER, PIRATE, SONG, THOUGHT, TOOLS, save_talker
from tests.webui.test_pages import no_run_stays, tiny_root  # noqa: F401  # a fixture

pytestmark = needs_browser
SECONDS = 120
SAID = "return [...document.querySelectorAll('.answer')].map(answer => answer.querySelector('.said').innerText)"
BELOW = "return document.documentElement.scrollHeight - window.scrollY - window.innerHeight"
HEIGHT = "return document.documentElement.scrollHeight"
STOP_AT = """const stop = [...document.querySelectorAll('.composer button')].find(one => one.innerText === 'Stop')
return stop.getBoundingClientRect().y"""


def send(page: Browser, message: str) -> None:
    page.type("#message", message)
    page.until(lambda: page.value("#message") == message, "it is not typed")
    page.click("Send")


def wait_for_answers(page: Browser, *begin: str) -> None:
    """Until each answer begins so and is complete."""

    def are_there() -> bool:
        said = page.js(SAID) if page.count("button.primary:not([disabled])") else []
        return len(said) == len(begin) and all(map(str.startswith, said, begin))

    page.until(are_there, f"no answers {begin}", SECONDS)


@pytest.mark.thorough
def test_a_conversation_with_its_settings(tmp_path):
    root = tmp_path / "root"
    folder = save_talker(root / "saves" / "talker")
    (folder / "board.yaml").write_text("model_name_or_path: nowhere\ntemplate: qwen3\n", "utf-8")
    (folder / "exit.json").write_text('{"status": 0}', "utf-8")
    with board(root) as served, browser(tmp_path) as page:
        page.open(served.address)
        page.open(f"{served.home}/chat?model=saves/talker")
        page.press("details summary")
        page.type("#max_tokens", "8")
        send(page, "hi")
        wait_for_answers(page, ANSWER)
        assert page.count(".answer details:not([open])") == 1 and THOUGHT not in page.text()
        page.press(".answer summary")
        page.until(lambda: THOUGHT in page.text(), "the thought does not unfold")

        page.type("#tools", "[")
        page.click("Retry")
        page.until(lambda: page.count(".answer .fault:not(:empty)"), "broken JSON is sent")
        assert "Settings: " in page.find(".answer .fault").text
        page.type("#tools", TOOLS)
        page.click("Retry")
        page.until(lambda: 'weather{"city": "Rome"}' in page.text(), "no call of the tool", SECONDS)
        wait_for_answers(page, ANSWER)
        page.type("#tools", "")

        page.type("#system", "Talk like a pirate: ARR")
        page.click("Retry")
        wait_for_answers(page, PIRATE)
        assert page.count(".asked") == 1
        page.type("#system", "")
        send(page, "ARR")
        wait_for_answers(page, PIRATE, PIRATE)
        page.press("//*[contains(@class, 'asked')][contains(., 'ARR')]//button")
        page.until(lambda: page.value("#message") == "ARR" and page.count(".asked") == 1, "it is not edited")
        send(page, "and now?")
        wait_for_answers(page, PIRATE, ANSWER)

        page.click("Send")  # with nothing typed: nothing is sent
        page.type("#max_tokens", "50000")
        send(page, "sing")
        page.until(lambda: str(page.js(SAID)[-1]).count(SONG) > 30, "it does not sing", SECONDS)
        place, height = page.js(STOP_AT), page.js(HEIGHT)
        page.until(lambda: page.js(HEIGHT) > height + 100, "the song does not grow", SECONDS)
        assert abs(page.js(STOP_AT) - place) < 2, "the button moves while the answer grows"
        page.until(lambda: page.js(BELOW) < 2, "the window does not follow the answer")
        page.click("Stop")
        wait_for_answers(page, PIRATE, ANSWER, ANSWER)
        stopped = str(page.js(SAID)[-1])
        assert 30 < stopped.count(SONG) < 49_000
        page.type("#max_tokens", "6")
        page.click("Retry")
        page.until(lambda: str(page.js(SAID)[-1]).count(SONG) < 3, "it is not asked again")
        wait_for_answers(page, PIRATE, ANSWER, ANSWER)
        page.click("Clear")
        page.until(lambda: not page.count(".asked"), "it is not cleared")
        assert page.errors() == []


@pytest.mark.thorough
def test_four_clicks_lead_from_the_first_page_to_a_tuned_model_that_answers(tmp_path):
    changes = {"output_dir": "quickstart/lora", "max_steps": 2, "finetuning_type": "lora"}
    root = tiny_root(tmp_path, **changes)
    (root / "examples").mkdir()
    (root / "tiny.yaml").rename(root / "examples" / "quickstart.yaml")
    with board(root) as served, browser(tmp_path) as page:
        page.open(served.address)
        page.click("Open the first run")
        page.until(lambda: "No problem found." in page.text(), "the run file is not checked")
        page.click("Start")
        page.until(lambda: page.count("[data-state=done]"), "the run does not end", SECONDS)
        page.click("Talk to it")
        page.until(lambda: page.count("#message"), "no chat")
        assert page.value("#model-a") == "quickstart/lora"
        send(page, "Who are you?")
        page.until(lambda: page.js(SAID) and page.js(SAID)[0], "no answer", SECONDS)
        assert "loaded · model + quickstart/lora" in page.text() and not page.count(".answer .fault:not(:empty)")
        assert page.errors() == []
