"""The pages in a real browser, with real runs."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from selenium.webdriver.common.keys import Keys

from luthier.core.manifest import verify_folder
from luthier.webui import process
from luthier.webui.runs import find_runs, read_run
from luthier.webui.texts import LANGUAGES, texts
from tests.small_world import small_world
from tests.webui.browser import board, browser, needs_browser
from tests.webui.test_chat_models import save_adapter

pytestmark = needs_browser
SECONDS = 240
"""What a run may take to begin or to end."""


@pytest.fixture(autouse=True)
def no_run_stays(tmp_path):
    """A run outlives whoever started it, so a test that fails must end it."""
    yield
    for run in find_runs(tmp_path):
        if run.is_live and run.is_ours:
            process.kill(run)


def tiny_root(folder: Path, **changes: object) -> Path:
    """A folder with a tiny model, data, and the run file `tiny.yaml`."""
    root = folder / "root"
    values = small_world(root) | {"output_dir": "saves/tiny", "max_steps": 100_000} | changes
    values |= {key: str(Path(values[key]).relative_to(root)) for key in ("model_name_or_path", "dataset_dir")}
    (root / "tiny.yaml").write_text("# a tiny run\n" + yaml.safe_dump(values), "utf-8")
    return root


def ended_run(root: Path, name: str, rate: float, steps: int = 30) -> Path:
    folder = root / "saves" / name
    folder.mkdir(parents=True)
    lines = [
        {"current_steps": n, "total_steps": steps, "loss": 3 / n, "lr": rate, "elapsed_time": f"0:00:{n:02d}"}
        for n in range(1, steps + 1)
    ]
    (folder / "trainer_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    (folder / "board.yaml").write_text(f"stage: sft\nlearning_rate: {rate}\n", "utf-8")
    (folder / "board.json").write_text('{"started": 1}', "utf-8")
    (folder / "exit.json").write_text('{"status": 0}', "utf-8")
    (folder / "console.log").write_text("<img src=x onerror=alert(1)>\n", "utf-8")
    return folder


@pytest.mark.thorough
def test_the_pages_open_without_an_error_and_ask_nobody_else(tmp_path):
    root = tiny_root(tmp_path)
    ended_run(root, "one", 1e-3)
    with board(root) as served, browser(tmp_path) as page:
        page.driver.get(served.home)
        assert page.text().strip() == "Open the link that `luthier webui` printed: it holds the token."
        page.open(served.address)
        assert all("401" in error for error in page.errors()), "only the page before had no cookie"
        assert page.driver.current_url == f"{served.home}/", "the token leaves the address"
        assert page.text_of("[data-state=done]") == "done"
        for path in (
            "/new?file=tiny.yaml",
            "/run/saves/one",
            "/compare?run=saves/one",
            "/compare",
            "/run/nowhere",
            "/chat",
        ):
            page.open(served.home + path)
            unlabeled = page.js(
                "return [...document.querySelectorAll('input, select, textarea')].filter(input =>"
                " !input.labels.length && !input.ariaLabel).map(input => input.id)"
            )
            assert unlabeled == []
        page.open(f"{served.home}/run/saves/one")
        page.until(lambda: page.count(".chart svg path") > 2, "no curve")
        assert "<img src=x" in page.text() and page.count("main img") == 0
        assert page.errors() == []
        assert page.requested_hosts() == {"127.0.0.1"}


@pytest.mark.thorough
def test_a_run_is_started_by_keyboard_and_outlives_the_board(tmp_path):
    root = tiny_root(tmp_path)
    folder = root / "saves" / "tiny"
    with browser(tmp_path) as page:
        with board(root) as served:
            page.open(served.address)
            page.open(f"{served.home}/new?file=tiny.yaml")
            page.until(lambda: "No problem found." in page.text(), "the run file is not checked")
            focused = "return document.activeElement.innerText"
            for _ in range(60):
                if page.js(focused) == "Start":
                    break
                page.press_key(Keys.TAB)
            assert page.js(focused) == "Start"
            page.press_key(Keys.ENTER)
            page.until(lambda: page.driver.current_url.endswith("/run/saves/tiny"), "no page of the run")
            page.until(lambda: page.count(".chart svg path") > 2, "no curve", SECONDS)
            assert (folder / "board.yaml").read_text("utf-8") == (root / "tiny.yaml").read_text("utf-8")
            assert page.errors() == []
            served.kill()
        step = read_run(folder).last["current_steps"]
        page.until(lambda: read_run(folder).last["current_steps"] > step + 3, "the run died with the board")
        with board(root) as served:
            page.open(served.address)
            assert page.text_of("[data-state=running]") == "running"
            page.click("tiny")
            page.until(lambda: page.count(".chart svg path") > 2, "no curve")
            page.click("Stop")
            page.until(lambda: page.count("[data-state=stopped]"), "it does not stop", SECONDS)
            (saved,) = folder.glob("checkpoint-*")
            assert verify_folder(saved) == []
            page.click("Resume")
            page.until(lambda: page.count("[data-state=running]"), "it is not resumed", SECONDS)
            last = int(saved.name.removeprefix("checkpoint-"))
            page.until(lambda: read_run(folder).last.get("current_steps", 0) > last, "no step after it", SECONDS)
            page.click("Kill")
            page.press(".q-dialog .danger")
            page.until(lambda: page.count("[data-state=stopped]"), "it is not killed", SECONDS)


@pytest.mark.thorough
def test_fields_and_file_are_two_views_of_one_text(tmp_path):
    root = tiny_root(tmp_path)
    with board(root) as served, browser(tmp_path) as page:
        page.open(served.address)
        page.open(f"{served.home}/new?file=tiny.yaml")
        page.type("#learning_rate", "quick")
        page.type("#output_dir", "saves/other")
        page.until(lambda: "output_dir: saves/other\n" in page.value("#yaml"), "the file does not follow")
        page.until(lambda: page.count("#learning_rate[aria-invalid=true]"), "no problem at the field")
        assert "must be a number" in page.text_of(".field:has(#learning_rate) .fault")
        page.click("Start")
        page.until(lambda: "1 problem(s)" in page.text(), "it starts with a problem")
        assert not (root / "saves" / "other").exists()
        page.type("#yaml", "stage: dpo\nlearning_rate: 2e-4\n")
        page.until(lambda: page.value("#learning_rate") == "2e-4", "the fields do not follow")
        page.until(lambda: page.count("#pref_beta"), "the keys of dpo do not appear")
        page.until(lambda: page.value("#stage") == "dpo", "the field of the stage does not follow")
        page.choose("#stage", "sft")
        page.find("#max_steps").send_keys("7")  # at once, while the groups of the other stage are drawn
        page.until(lambda: not page.count(".field:not(.hidden) > #pref_beta"), "the keys of dpo stay")
        page.until(lambda: "max_steps: 7\n" in page.value("#yaml"), "what was typed is lost")
        assert page.value("#max_steps") == "7" and page.js("return document.activeElement.id") == "max_steps"
        page.press("#template")
        page.until(lambda: page.count("#known-template option[value=qwen3]"), "no template is offered")
        assert not page.count("#weight_decay")
        page.press("//summary[contains(., 'Training')]")
        page.type("#weight_decay", "0.1")
        page.until(lambda: "weight_decay: 0.1\n" in page.value("#yaml"), "a field of a closed group does not work")
        page.type("#search", "dora")
        page.until(lambda: page.count("#use_dora") and not page.count("#learning_rate"), "no search")
        page.press("#use_dora")
        page.until(lambda: page.value("#yaml").endswith("use_dora: true\n"), "a switch does not switch")
        page.type("#save-name", "kept")
        page.click("Save")
        page.until(lambda: (root / "kept.yaml").exists(), "it is not saved")
        assert (root / "kept.yaml").read_text("utf-8") == page.value("#yaml")
        assert page.errors() == []


@pytest.mark.thorough
def test_runs_are_compared(tmp_path):
    root = tiny_root(tmp_path)
    ended_run(root, "one", 1e-3)
    ended_run(root, "two", 2e-3)
    with board(root) as served, browser(tmp_path) as page:
        page.open(served.address)
        for name in ("one", "two"):
            page.press(f"[id='mark-saves/{name}']")
        page.click("Compare", "button")
        page.until(lambda: "/compare?" in page.driver.current_url, "no comparison")
        page.until(lambda: "learning_rate" in page.text(), "no table of keys")
        assert re.search(r"learning_rate\s+0.001\s+0.002", page.text())
        page.until(lambda: page.count(".chart svg path") > 3, "no curves")
        assert page.errors() == []


@pytest.mark.thorough
def test_every_language_is_complete_and_a_phone_needs_no_sideways_scroll(tmp_path):
    root = tiny_root(tmp_path)
    ended_run(root, "one", 1e-3)
    english = {text for text in texts("en").values() if len(text) > 3}
    with board(root) as served, browser(tmp_path, width=500) as page:
        page.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        )
        page.open(served.address)
        page.choose("#language", LANGUAGES["zh"])
        page.until(lambda: texts("zh")["page.new"] in page.text(), "the language does not change")
        for path in (
            "/",
            "/new?file=tiny.yaml",
            "/run/saves/one",
            "/compare?run=saves/one",
            "/chat",
            "/data",
            "/export",
        ):
            page.open(served.home + path)
            page.until(lambda: texts("zh")["page.runs"] in page.text(), "the language is forgotten")
            labels = page.js(
                "return [...document.querySelectorAll('button, h1, h2, dt, th, label, nav a, .badge, .note, .card p')]"
                ".map(item => item.innerText.trim())"
            )
            assert not english & set(labels)
            helped = page.js("return [...document.querySelectorAll('.field .help')].map(item => item.innerText)")
            assert all(re.search(r"[\u4e00-\u9fff]", text) for text in helped)
            assert page.js("return document.documentElement.scrollWidth") <= 360, path
        assert page.errors() == []


@pytest.mark.thorough
def test_a_run_that_dies_before_its_first_step_shows_the_end_of_its_log(tmp_path):
    root = tiny_root(tmp_path)
    process.start(root / "saves" / "dead", "stage: sft\nlearning_rat: 1\n")
    with board(root) as served, browser(tmp_path) as page:
        page.open(served.address)
        page.open(f"{served.home}/run/saves/dead")
        page.until(lambda: page.count("[data-state=failed]"), "it did not fail", SECONDS)
        page.until(lambda: "did you mean learning_rate" in page.text(), "its log is not shown")
        page.click("Delete")
        page.press(".q-dialog .danger")
        page.until(lambda: not (root / "saves" / "dead").exists(), "it is not deleted")
    shutil.rmtree(root)


def tuned_run(root: Path, scale: float) -> dict[str, Any]:
    """Makes the folder of a run that is done, with an adapter. Returns its run file."""
    values: dict[str, Any] = yaml.safe_load((root / "tiny.yaml").read_text("utf-8")) | {"finetuning_type": "lora"}
    folder = root / "saves" / "tuned"
    save_adapter(str(root / values["model_name_or_path"]), folder, scale=scale)
    (folder / "board.yaml").write_text(yaml.safe_dump(values), "utf-8")
    (folder / "exit.json").write_text('{"status": 0}', "utf-8")
    return values


@pytest.mark.thorough
def test_two_models_answer_side_by_side(tmp_path):
    root = tiny_root(tmp_path)
    values = tuned_run(root, scale=5.0)
    said = "return [...document.querySelectorAll('.answer')].map(item => item.innerText)"
    with board(root) as served, browser(tmp_path) as page:
        page.open(served.address)
        page.open(f"{served.home}/chat?model=saves/tuned")
        page.choose("#model-b", f"{values['model_name_or_path']} (base)")
        page.type("#message", "<b>hi</b>")
        page.click("Send")
        page.until(lambda: page.count(".said:not(:empty)") == 2, "no answers", SECONDS)
        page.until(lambda: page.count("button.primary:not([disabled])"), "the answers do not end", SECONDS)
        tuned, base = page.js(said)
        assert "saves/tuned" in tuned and "saves/tuned" not in base
        assert tuned.partition("\n")[2] != base.partition("\n")[2]
        assert page.count(".asked b") == 0 and page.text_of(".asked p") == "<b>hi</b>"
        page.click("Unload")
        page.until(lambda: "not loaded" in page.text(), "it is not unloaded")
        assert page.errors() == []


@pytest.mark.thorough
def test_a_broken_entry_is_named_and_rows_are_shown_raw_and_as_tokens(tmp_path):
    root = tiny_root(tmp_path)
    info, hostile = root / "data" / "dataset_info.json", '<img src=x onerror="document.title=1">'
    described = {"broken": {"file_nam": "x.json"}, "hostile": {"file_name": "hostile.json"}}
    info.write_text(json.dumps(json.loads(info.read_text("utf-8")) | described), "utf-8")
    rows = [{"instruction": hostile, "output": hostile}, {"instruction": "b", "output": "c", "note": 1}]
    (root / "data" / "hostile.json").write_text(json.dumps(rows), "utf-8")
    with board(root) as served, browser(tmp_path) as page:
        page.open(served.address)
        page.open(f"{served.home}/data")
        page.until(lambda: page.count(".entries .fault"), "the broken entry is not named")
        assert "file_nam" in page.text_of(".entries .fault") and "numbers" in page.text()
        page.click("hostile")
        page.until(lambda: page.value("#dataset") == "hostile", "it is not chosen")
        page.type("#model_name_or_path", "nowhere")
        page.type("#template", "chatml")
        page.click("Show rows")
        page.until(lambda: page.count(".log.fault"), "no word about the model", SECONDS)
        assert "nowhere" in page.text_of(".log.fault") and hostile.replace('"', '\\"') in page.text_of(".raw")
        page.type("#model_name_or_path", "model")
        page.click("Show rows")
        page.until(lambda: page.count("iframe.rows"), "no rows", SECONDS)
        raw = page.js("return [...document.querySelectorAll('.raw pre')].map(row => JSON.parse(row.innerText))")
        assert raw == rows and "hostile.json, row 1" in page.text_of(".raw")
        assert page.count("main img") == 0 and "Data" in page.driver.title
        page.driver.switch_to.frame(page.find("iframe.rows"))
        page.until(lambda: "train row 0" in page.text(), "the rows are not drawn")
        tokens = page.text()
        assert "img src=x onerror" in tokens.replace("\n", "") and page.count("img") == 0
        page.driver.switch_to.default_content()
        info.write_text("{", "utf-8")
        page.open(f"{served.home}/data")
        assert "not JSON" in page.text_of(".fault")
        assert page.errors() == []


@pytest.mark.thorough
def test_an_adapter_is_merged_and_exported(tmp_path):
    root = tiny_root(tmp_path)
    tuned_run(root, scale=1.0)
    with board(root) as served, browser(tmp_path) as page:
        page.open(served.address)
        page.open(f"{served.home}/run/saves/tuned")
        page.press(".title a[href^='/export']")
        page.until(lambda: "No problem found." in page.text(), "the run file is not checked")
        assert page.value("#export_dir") == "saves/tuned-merged" and not page.count("#learning_rate")
        page.click("Start")
        page.until(lambda: page.driver.current_url.endswith("/run/saves/tuned-merged"), "no page of the export")
        page.until(lambda: page.count("[data-state=done]"), "it does not end", SECONDS)
        assert verify_folder(root / "saves" / "tuned-merged") == []
        assert (root / "saves" / "tuned-merged" / "model.safetensors").is_file()
        assert page.errors() == []
