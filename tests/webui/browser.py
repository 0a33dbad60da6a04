"""Headless Chromium, and a board as a process of its own."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER) and not os.environ.get("CI"), reason="chromium and chromium-driver are not installed"
)
SECONDS = 60


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
        assert line.startswith("ready: http://127.0.0.1:"), line + self.errors.read_text("utf-8")
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
        self.until(lambda: self.js("return window.did_handshake === true"), "the page is not connected")

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def find(self, selector: str) -> Any:
        from selenium.webdriver.common.by import By

        return self.until(lambda: self.driver.find_elements(By.CSS_SELECTOR, selector), selector)[0]

    def count(self, selector: str) -> int:
        return int(self.js("return document.querySelectorAll(arguments[0]).length", selector))

    def button(self, label: str) -> Any:
        """The first visible button or link of this name."""
        from selenium.webdriver.common.by import By

        def found() -> list[Any]:
            path = f"//*[self::button or self::a][normalize-space()='{label}']"
            return [item for item in self.driver.find_elements(By.XPATH, path) if item.is_displayed()]

        return self.until(found, f"button {label}")[0]

    def click(self, label: str) -> None:
        """Click a button or link, which a live page may draw again at any moment."""

        def clicked() -> bool:
            self.button(label).click()
            return True

        self.until(clicked, f"click {label}")

    def type(self, selector: str, words: str) -> None:
        """Replace what an input holds."""
        from selenium.webdriver.common.keys import Keys

        self.find(selector).send_keys(Keys.CONTROL, "a")
        self.find(selector).send_keys(words or Keys.DELETE)

    def text(self) -> str:
        return str(self.js("return document.body.innerText"))

    def value(self, selector: str) -> str:
        return str(self.js("return document.querySelector(arguments[0]).value", selector))

    def until(self, is_so: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
        """What `is_so` gives as soon as it is true."""
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(StaleElementReferenceException):
                if result := is_so():
                    return result
            time.sleep(0.05)
        raise AssertionError(f"{what}\n{self.text()}")

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


@contextlib.contextmanager
def browser(folder: Path, width: int = 1280, height: int = 900) -> Iterator[Browser]:
    opened = Browser(folder, width, height)
    try:
        yield opened
    finally:
        opened.driver.quit()
