"""An evaluation from the page of a run, in a browser."""

import pytest
import yaml

from tests.webui.browser import board, browser, needs_browser
from tests.webui.test_pages import SECONDS, tiny_root, tuned_run

pytestmark = needs_browser


@pytest.mark.thorough
def test_an_adapter_is_compared_with_its_base(tmp_path):
    """Started from the page of the run, and what came of it stands there too."""
    root = tiny_root(tmp_path)
    values = tuned_run(root, scale=1.0) | {"output_dir": "saves/tuned"}
    (root / "saves" / "tuned" / "board.yaml").write_text(yaml.safe_dump(values), "utf-8")
    with board(root) as served, browser(tmp_path) as page:
        page.open(served.address)
        page.open(f"{served.home}/run/saves/tuned")
        page.press(".title a[href^='/evaluate']")
        page.until(lambda: page.count("#save_dir"), "no form")
        assert page.value("#save_dir") == "saves/tuned-evaluation"
        assert page.value("#compare") == "base" and not page.count("#learning_rate")
        page.type("#max_samples", "3")
        page.type("#max_new_tokens", "4")
        page.click("Start")
        page.until(lambda: page.driver.current_url.endswith("/run/saves/tuned-evaluation"), "no page of the evaluation")
        page.until(lambda: page.count("[data-state=done]"), "it does not end", SECONDS)
        page.until(lambda: "95 % interval" in page.text(), "no table")
        page.driver.save_screenshot(str(tmp_path / "evaluation.png"))
        page.open(f"{served.home}/run/saves/tuned")
        page.until(lambda: "95 % interval" in page.text(), "the run does not tell of its evaluation")
        assert page.errors() == []
