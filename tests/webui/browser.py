"""Headless Chromium, and a board as a process of its own."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import until

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER) and not os.environ.get("CI"), reason="chromium and chromium-driver are not installed"
)
SECONDS = 120
"""What a page may take to answer. Waiting costs time in a test that fails only."""


class BoardProcess:
    """`luthier webui` with a free port; `address` holds the token, `home` does not."""

    def __init__(self, root: Path, *words: str) -> None:
        # Its own session, so that nothing that is sent to the board reaches the tests.
        self.errors = root.parent / f"{root.name}-stderr.txt"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "luthier", "webui", "--port", "0", "--root", str(root), *words],
            stdout=subprocess.PIPE,
            stderr=self.errors.open("a"),
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("ready: http://127.0.0.1:"):
            self.kill()
            raise AssertionError(line + self.errors.read_text("utf-8"))
        self.address = line.removeprefix("ready: ").strip()
        self.home = self.address.partition("/?")[0]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def board(root: Path, *words: str) -> Iterator[BoardProcess]:
    started = BoardProcess(root, *words)
    try:
        yield started
    finally:
        started.kill()


class Browser:
    """What a user does, and what he sees."""

    def __init__(self, folder: Path, width: int = 1280, height: int = 900) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        assert CHROMIUM and DRIVER, "chromium and chromium-driver are not installed"
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"):
            options.add_argument(word)
        options.add_argument(f"--user-data-dir={folder / 'profile'}")
        options.add_argument(f"--window-size={width},{height}")
        options.add_argument("--lang=en-US")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))

    def open(self, address: str) -> None:
        self.driver.get(address)
        self.until(self.is_connected, "the page is not connected")

    def is_connected(self) -> bool:
        """Whether the board has taken notice of the page, so that it can be used."""
        return bool(self.js("return window.did_handshake === true && !document.querySelector('[inert]')"))

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def find(self, selector: str) -> Any:
        """The first element, once it is there."""
        return self.until(lambda: self._found(selector), selector)[0]

    def _found(self, selector: str) -> list[Any]:
        from selenium.webdriver.common.by import By

        return self.driver.find_elements(By.XPATH if selector.startswith("/") else By.CSS_SELECTOR, selector)

    def _visible(self, selector: str) -> list[Any]:
        return [item for item in self._found(selector) if item.is_displayed()]

    def count(self, selector: str) -> int:
        return int(self.js("return document.querySelectorAll(arguments[0]).length", selector))

    def button(self, label: str) -> Any:
        """The first visible button or link of this name."""
        return self.until(lambda: self._visible(_named(label)), f"button {label}")[0]

    def click(self, label: str, kind: str = "", seconds: float = SECONDS) -> None:
        """Click the first visible button or link of this name once it can be clicked. `kind`: `button` or `a`."""
        self.press(_named(label, kind), seconds)

    def press(self, selector: str, seconds: float = SECONDS) -> None:
        """Click the first visible element of a CSS selector or an XPath once it can be clicked.

        A live page may move, cover, disable or draw an element again at any moment. What stays covered or disabled is
        a failure.
        """
        from selenium.common.exceptions import ElementClickInterceptedException, ElementNotInteractableException

        reasons = ["it is not there"]

        def pressed() -> bool:
            for item in self._visible(selector)[:1]:
                reasons.append("it is disabled")
                if item.is_enabled():
                    try:
                        item.click()
                    except (ElementClickInterceptedException, ElementNotInteractableException) as fault:
                        reasons.append(str(fault.msg))
                        # Away from what sticks to an edge of the window.
                        self.js("arguments[0].scrollIntoView({block: 'center'})", item)
                    else:
                        return True
            return False

        self.until(self.is_connected, "the page is not connected")
        self.until(pressed, lambda: f"{selector} cannot be clicked: {reasons[-1]}", seconds)

    def type(self, selector: str, words: str) -> None:
        """Replace what an input holds."""
        from selenium.webdriver.common.keys import Keys

        def typed() -> bool:
            self.find(selector).send_keys(Keys.CONTROL, "a")
            self.find(selector).send_keys(words or Keys.DELETE)
            return True

        self.until(self.is_connected, "the page is not connected")
        self.until(typed, f"nothing can be typed in {selector}")

    def choose(self, selector: str, label: str) -> None:
        """Choose the option with this text."""
        from selenium.webdriver.support.ui import Select

        def chosen() -> bool:
            options = Select(self.find(selector))
            if label not in (option.text for option in options.options):
                return False
            options.select_by_visible_text(label)
            return True

        self.until(self.is_connected, "the page is not connected")
        self.until(chosen, f"{selector} has no option {label}")

    def press_key(self, key: str) -> None:
        """For whatever has the focus."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(key).perform()

    def text_of(self, selector: str) -> str:
        """The text of the first element, once it is there. It is read in one go, so no element is stale."""
        texts = "return [...document.querySelectorAll(arguments[0])].map(item => item.innerText)"
        return str(self.until(lambda: self.js(texts, selector), selector)[0])

    def text(self) -> str:
        return str(self.js("return document.body ? document.body.innerText : ''"))

    def value(self, selector: str) -> str:
        return str(self.js("return document.querySelector(arguments[0]).value", selector))

    def until(self, is_so: Callable[[], Any], what: str | Callable[[], str], seconds: float = SECONDS) -> Any:
        """What `is_so` gives as soon as it is true. An element that has been drawn again meanwhile is not true yet."""
        from selenium.common.exceptions import StaleElementReferenceException

        def is_so_now() -> Any:
            with contextlib.suppress(StaleElementReferenceException):
                return is_so()
            return None

        def otherwise() -> str:
            return f"{what if isinstance(what, str) else what()}\n{self.text()}"

        return until(is_so_now, otherwise, seconds=seconds, pause_seconds=0.05)

    def errors(self) -> list[str]:
        """What the console has shown since it was last asked."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def requested_hosts(self) -> set[str]:
        """The hosts that the browser asked since it was last asked for them."""
        import json
        from urllib.parse import urlsplit

        hosts = set()
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            url = message.get("params", {}).get("request", {}).get("url", "")
            if message["method"] == "Network.requestWillBeSent" and url.startswith("http"):
                hosts.add(urlsplit(url).hostname or "")
        return hosts


def _named(label: str, kind: str = "") -> str:
    """The XPath of buttons and links with this name."""
    kinds = f"self::{kind}" if kind else "self::button or self::a"
    return f"//*[{kinds}][normalize-space()='{label}']"


@contextlib.contextmanager
def browser(folder: Path, width: int = 1280, height: int = 900) -> Iterator[Browser]:
    opened = Browser(folder, width, height)
    try:
        yield opened
    finally:
        opened.driver.quit()
