"""`luthier data RUN --html FILE`: one file that shows the rows."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier.cli import main
from tests.small_world import small_world

CHATML = "<|im_start|>user\nhi ☂<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    world = small_world(tmp_path_factory.mktemp("world"))
    rows = [
        {"instruction": "<script>alert(1)</script> & ☂", "output": "<b>ok</b>"},
        {"instruction": "no answer at all"},
    ]
    folder = Path(world["dataset_dir"])
    (folder / "odd.json").write_text(json.dumps(rows), encoding="utf-8")
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "odd": {"file_name": "odd.json"}}))
    return world


@pytest.fixture
def page(world, tmp_path, capsys):
    """The text of the page that `luthier data` writes for a run file with the changes."""

    def write(*words: str, **changes: Any) -> str:
        run_file, file = tmp_path / "run.yaml", tmp_path / "page.html"
        run_file.write_text(yaml.safe_dump({**world, **changes}), encoding="utf-8")
        assert main(["data", str(run_file), "--html", str(file), *words]) == 0
        assert capsys.readouterr().out == f"written: {file}\n"
        return file.read_text("utf-8")

    return write


class Tokens(HTMLParser):
    """(classes, tip, text) of every token of the rows, and all tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tokens: list[tuple[set[str], str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        if tag == "i" and "data-t" in values:
            self.tokens.append((set((values.get("class") or "").split()), values["data-t"] or "", ""))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "i" and self.tokens and not self.tokens[-1][2]:
            self.tokens[-1] = (*self.tokens[-1][:2], data)

    def text(self, flag: str) -> str:
        return "".join(text for classes, _, text in self.tokens if flag in classes)


def test_every_token_is_shown_with_its_label_and_its_id(page):
    read = Tokens(page("--row", "3"))
    assert "".join(text for _, _, text in read.tokens) == (
        "<|im_start|>user\nSay the number 3.<|im_end|>\n<|im_start|>assistant\nvery very very well: 3<|im_end|>\n"
    )
    assert read.text("l") == "very very very well: 3<|im_end|>\n"
    assert read.text("s") == "<|im_start|><|im_end|><|im_start|><|im_end|>"
    assert read.tokens[0][1] == "257 “<|im_start|>”" and read.tokens[5][1] == "198 “\\n”"


def test_the_text_of_the_data_is_escaped(page):
    text = page(dataset="odd")
    read = Tokens(text)
    assert text.count("<script>") == 1 and "alert(1)" not in re.findall("<script>.*</script>", text, re.DOTALL)[0]
    assert "".join(text for classes, _, text in read.tokens if "l" in classes) == "<b>ok</b><|im_end|>\n"
    (umbrella,) = [tip for _, tip, text in read.tokens if text == "☂"]
    assert len(umbrella.split()) == 4, "three tokens that make one character are shown as one"


def test_nothing_comes_from_elsewhere(page):
    read = Tokens(page())
    assert not [values for _, values in read.tags if "src" in values or "link" in values]
    assert all((values["href"] or "").startswith("#") for _, values in read.tags if "href" in values)
    assert not re.search(r"https?://|@import|url\(", page())


def test_which_rows_are_on_the_page(page):
    assert re.findall(r'id="(row-\d+)"', page("--limit", "2")) == ["row-0", "row-1"]
    assert "train row 7<" in page("--row", "7")
    assert "shown <b>4 of 4 eval rows</b>" in page("--split", "eval", val_size=4)
    assert page("--limit", "0").count("<section") == 24


def test_the_account_of_all_rows_with_reasons(page):
    text = page(dataset="odd")
    assert "<td>odd</td><td>2</td><td>1</td><td>1</td><td>0</td>" in text
    assert "is missing" in text and "odd.json, row 2" in text


def test_prompts_for_generation_show_the_answer_behind_them(page):
    changes = {"eval_dataset": "tools", "predict_with_generate": True, "cutoff_len": 600}
    assert Tokens(page("--split", "eval", "--row", "1", **changes)).text("l") == "four<|im_end|>\n"
