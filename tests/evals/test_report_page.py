"""The report as a page."""

import re
from html.parser import HTMLParser

from luthier.evals.measure import mean_of
from luthier.evals.paired import compare
from luthier.evals.report import Example, Line, Report
from luthier.evals.report_page import page

EVIL = "</pre><script>alert('x')</script>&\"$base"


def written(**changes):
    line = Line("mmlu_test", "accuracy", "higher", compare(mean_of([0] * 8 + [1] * 4), mean_of([1] * 12)))
    example = Example("mmlu_test", "accuracy", "better", EVIL, EVIL, EVIL, EVIL, EVIL)
    report = Report(**{"base": EVIL, "tuned": "b", "lines": [line], "examples": [example], "notes": [EVIL], **changes})
    return page(report, {"seed": "42"})


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "circle", "line", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parsed(text):
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    return tags


def test_every_text_is_escaped_and_shown():
    tags = parsed(written())
    assert "script" not in {tag for tag, _ in tags.seen}
    assert tags.text.count(EVIL) >= 7


def test_nothing_is_asked_of_the_network():
    assert not re.search(r"(src|href)=|url\(|@import", written())


def test_the_table_has_the_numbers_and_a_drawing_with_words():
    tags = parsed(written())
    assert "0.3333" in tags.text and "+0.6667" in tags.text
    (drawing,) = [attrs for tag, attrs in tags.seen if tag == "svg"]
    assert drawing["aria-label"].startswith("+0.6667, 95 % interval +")
    assert "prefers-color-scheme: dark" in written()


def test_a_single_question_has_no_drawing():
    line = Line("t", "m", "higher", compare(mean_of([0.5]), mean_of([0.7])))
    assert "<svg" not in written(lines=[line])
