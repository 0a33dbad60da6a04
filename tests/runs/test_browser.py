"""The helper of the browser tests waits for what moves, and reports what can never be clicked."""

from urllib.parse import quote

import pytest

from tests.webui.browser import browser, needs_browser

pytestmark = needs_browser
PAGE = """
<style>
    #cover { position: fixed; inset: 0; background: white }
</style>
<script>
    did_handshake = true;
    const count = item => item.dataset.clicks = Number(item.dataset.clicks ?? 0) + 1;
    const hide = () => document.body.insertAdjacentHTML("beforeend", "<div id=cover></div>");
</script>
<button id="stays" onclick="count(this)">Stays</button>
<button id="waits" onclick="count(this)" disabled>Waits</button>
<input id="field" value="old"><select id="list"></select>
"""
CLICKS = "return document.querySelector(arguments[0]).dataset.clicks"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(autouse=True)
def opened(page):
    page.driver.get("data:text/html," + quote(PAGE))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("between", "after"),
    [("hide()", "cover.remove()"), ("stays.outerHTML = stays.outerHTML", "")],
    ids=["moved", "drawn"],
)
def test_what_happens_between_finding_and_clicking_leads_to_another_try(page, monkeypatch, between, after):
    own, changes = page._visible, [between, after]

    def found(selector):
        if len(changes) == 1:
            page.js(changes.pop())
        items = own(selector)
        if changes:
            page.js(changes.pop(0))
        return items

    monkeypatch.setattr(page, "_visible", found)
    page.click("Stays")
    assert page.js(CLICKS, "#stays") == "1" and not changes


@pytest.mark.thorough
def test_a_button_is_clicked_when_it_can_be_used(page):
    page.js("setTimeout(() => waits.disabled = false, 500)")
    page.click("Waits")
    assert page.js(CLICKS, "#waits") == "1"


@pytest.mark.thorough
def test_a_button_that_stays_covered_disabled_or_away_is_a_failure(page):
    with pytest.raises(AssertionError, match="it is disabled"):
        page.click("Waits", seconds=0.3)
    with pytest.raises(AssertionError, match="it is not there"):
        page.click("Nowhere", seconds=0.3)
    page.js("hide()")
    with pytest.raises(AssertionError, match=r"click intercepted.*cover"):
        page.click("Stays", seconds=0.3)
    assert page.js(CLICKS, "#stays") is None


@pytest.mark.thorough
def test_words_replace_what_was_there_and_an_option_is_waited_for(page):
    page.type("#field", "new")
    assert page.value("#field") == "new"
    page.type("#field", "")
    assert page.value("#field") == ""
    page.js("setTimeout(() => list.innerHTML = '<option>one<option>only', 500)")
    page.choose("#list", "only")
    assert page.value("#list") == "only"
