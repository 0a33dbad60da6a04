"""How the pages look: each in both themes and on a phone, in every state, as pictures for those who change them.

`LUTHIER_SCREENSHOTS=DIR` keeps the pictures. What is tested is what can be: the theme, no sideways scroll at 360
pixels, no error in the console, and the contrast of texts.
"""

import base64
import json
import os
import platform
from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier.webui.identity import mark_of
from tests.small_world import small_world
from tests.webui.browser import Browser, board, browser, needs_browser

pytestmark = needs_browser
PAGES = {
    "runs": "/",
    "new": "/new?file=tiny.yaml",
    "new-wrong": "/new?file=wrong.yaml",
    "run": "/run/saves/curve",
    "run-live": "/run/saves/live",
    "run-failed": "/run/saves/failed",
    "run-lost": "/run/saves/lost",
    "run-absent": "/run/nowhere",
    "compare": "/compare?run=saves/curve&run=saves/live",
    "compare-empty": "/compare",
    "data": "/data",
    "chat": "/chat",
    "export": "/export",
}
MIN_CONTRAST = 4.5
"""Of WCAG 2.2, 1.4.3, level AA."""
CONTRAST = """
const linear = part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
const light = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(part => linear(part / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = item => {
    for (; item; item = item.parentElement) {
        const color = getComputedStyle(item).backgroundColor;
        if (!/, 0\\)$/.test(color)) return color;
    }
    return 'rgb(255, 255, 255)';
};
const hasText = item => [...item.childNodes].some(node => node.nodeType == 3 && node.data.trim());
return [...document.querySelectorAll('main *, header *')]
    .filter(item => item.checkVisibility() && hasText(item) && !item.closest('svg, select, [disabled], .unseen'))
    .map(item => {
        const [a, b] = [light(getComputedStyle(item).color), light(behind(item))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        return [ratio, item.className, item.innerText.slice(0, 40)];
    })
    .filter(([ratio]) => ratio < arguments[0]);
"""
"""Visible texts whose contrast with what is behind them is too low: (ratio, classes, text)."""
PLACES = """
return [...document.querySelectorAll(arguments[0])].map(item => {
    const place = item.getBoundingClientRect();
    return [item.innerText, place.x, place.y + window.scrollY];
});
"""
"""(text, x, y) of the elements of a selector."""


def run_folder(root: Path, name: str, loss: float, console: str = "", **files: Any) -> None:
    folder = root / "saves" / name
    folder.mkdir(parents=True)
    lines = [
        {
            "current_steps": n,
            "total_steps": 300,
            "loss": loss + 2 / n + (n % 7) / 40,
            "lr": 1e-4 * (1 - n / 300),
            "grad_norm": 1 + (n % 11) / 10,
            "epoch": n / 100,
            "elapsed_time": f"0:0{n // 60}:{n % 60:02d}",
            "throughput": 812.5,
        }
        for n in range(1, 241)
    ]
    log = "".join(json.dumps(line) + "\n" for line in lines) if loss else ""
    (folder / "trainer_log.jsonl").write_text(log, "utf-8")
    (folder / "console.log").write_text(console, "utf-8")
    (folder / "board.yaml").write_text(f"stage: sft\nlearning_rate: {loss}\n", "utf-8")
    for stem, value in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(value), "utf-8")


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "root"
    values = small_world(root) | {"output_dir": "saves/tiny"}
    values |= {key: str(Path(values[key]).relative_to(root)) for key in ("model_name_or_path", "dataset_dir")}
    (root / "tiny.yaml").write_text(yaml.safe_dump(values), "utf-8")
    (root / "wrong.yaml").write_text(yaml.safe_dump(values | {"learning_rate": "quick", "lora_rnk": 8}), "utf-8")
    info = root / "data" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text("utf-8")) | {"broken": {"file_nam": "x.json"}}), "utf-8")
    here = {"argv": [], "pid": os.getpid(), "mark": mark_of(os.getpid()), "host": platform.node(), "started": 1.8e9}
    results = {"train_loss": 1.234567, "train_runtime": 240.5, "eval_loss": 1.5}
    run_folder(root, "curve", 1.0, "training is over\n", board=here, exit={"status": 0}, all_results=results)
    run_folder(root, "live", 0.8, "step 240 of 300\n", board=here)
    fault = "luthier: run.yaml: learning_rat: unknown key -> did you mean learning_rate?\n"
    run_folder(root, "failed", 0, fault, board=here, exit={"status": 2})
    run_folder(root, "stopped", 0.9, board=here, exit={"status": 130})
    run_folder(root, "lost", 0.9, board=here | {"mark": "of another process"})
    return root


def picture(page: Browser, folder: Path, name: str) -> None:
    """The whole page, also what is below the window."""
    height = page.js("return document.documentElement.scrollHeight")
    shot = page.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": height < 6000})
    (folder / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))


def open_drawn(page: Browser, address: str, path: str) -> None:
    page.open(address)
    if "/run/saves/curve" in path or "compare?" in path:
        page.until(lambda: page.count(".chart svg path") > 2, "no curve")
    if path.startswith("/new?"):
        page.until(lambda: page.count(".summary p"), "it is not checked")


@pytest.mark.thorough
def test_every_page_in_both_themes_and_on_a_phone(root, tmp_path):
    pictures = Path(os.environ.get("LUTHIER_SCREENSHOTS") or tmp_path / "pictures")
    pictures.mkdir(parents=True, exist_ok=True)
    with board(root) as served, browser(tmp_path) as page:
        page.open(served.address)
        assert page.js(CONTRAST, 21), "contrast is measured"
        papers = set()
        for theme in ("light", "dark"):
            page.click({"light": "Auto", "dark": "Light"}[theme])
            page.until(lambda theme=theme: f"luthier_theme={theme}" in page.js("return document.cookie"), theme)
            for name, path in PAGES.items():
                open_drawn(page, served.home + path, path)
                picture(page, pictures, f"{name}-{theme}")
                assert page.js(CONTRAST, MIN_CONTRAST) == [], (name, theme)
            papers.add(page.js("return getComputedStyle(document.body).backgroundColor"))
        assert len(papers) == 2, "both themes are one"
        phone = {"width": 360, "height": 780, "deviceScaleFactor": 1, "mobile": True}
        page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        for name, path in PAGES.items():
            open_drawn(page, served.home + path, path)
            picture(page, pictures, f"{name}-phone")
            assert page.js("return document.documentElement.scrollWidth") <= 360, name
        assert page.errors() == []


@pytest.mark.thorough
def test_a_page_cannot_be_used_before_it_is_connected(root, tmp_path):
    """NiceGUI would drop what is clicked and typed."""
    from selenium.common.exceptions import ElementClickInterceptedException, ElementNotInteractableException

    with board(root) as served, browser(tmp_path) as page:
        page.open(served.address)
        silent = {"source": "window.WebSocket = class extends EventTarget { send() {} close() {} }"}
        script = page.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", silent)
        page.driver.get(f"{served.home}/new?file=tiny.yaml")
        for label in ("Start", "Auto"):
            with pytest.raises(ElementClickInterceptedException):
                page.button(label).click()
        with pytest.raises(ElementNotInteractableException):
            page.find("#learning_rate").send_keys("1")
        page.button("Compare").click()
        page.until(lambda: page.driver.current_url == f"{served.home}/compare", "a link does not work")

        page.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
        page.open(f"{served.home}/new?file=tiny.yaml")
        page.type("#learning_rate", "0.125")
        page.until(lambda: "learning_rate: 0.125" in page.value("#yaml"), "nothing is typed")
        page.click("Auto")
        page.until(lambda: page.count("body.body--light") and page.button("Light"), "the theme stays")


@pytest.mark.thorough
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_moves_while_a_log_grows_and_no_button_when_a_run_ends(root, tmp_path, width):
    folder = root / "saves" / "live"
    with board(root) as served, browser(tmp_path) as page:
        window = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
        page.open(served.address)
        page.open(f"{served.home}/run/saves/live")
        page.until(lambda: page.count(".chart svg path") > 2, "no curve")
        buttons, below = page.js(PLACES, ".title button"), page.js(PLACES, "summary")
        assert len(buttons) == 5 and len(below) == 2
        (folder / "console.log").write_text("a line\n" * 100 + "the last line\n", "utf-8")
        page.until(lambda: "the last line" in page.text(), "the log is not read")
        assert page.js(PLACES, "summary") == below
        (folder / "exit.json").write_text('{"status": 0}', "utf-8")
        page.until(lambda: page.count("[data-state=done]") and page.button("Talk to it"), "it does not end")
        assert page.js(PLACES, ".title button") == buttons
